"""Make the pictures of README.md and docs/ from drawn streets.

python benchmarks/pictures.py TEACHER OUT [--smallest]

The streets are drawn by manifests/scenes.py, so the pictures have the project's own licence. The script runs the
commands as a user types them, opens the report in the system's Chromium, and photographs it. TEACHER is a checkpoint
that knows drawn streets. Needs `pip install '.[test]'`, and chromium on the PATH. With --smallest, pictures of a tiny
city go to OUT/docs, and without chromium there are none.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from autolabel import cli
from autolabel.manifests.drawing import draw_label
from autolabel.manifests.images import read_image, read_label
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scenes import write_city

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHADE = 0.8  # opacity of the colours of a label over its photograph
PLOTS = ("#classes", "#how")  # the plots of a report lie between these parts
PHONES = (("light", "header"), ("dark", "#confidence"), ("light", "#classes"), ("dark", ""))
# Leave one sample in the section "By scale" and put its photograph into the empty place of the second row.
ALONE = """id => {
  for (const article of document.querySelectorAll("#by-scale article")) {
    article.hidden = !article.textContent.includes(id);
    if (article.hidden) continue;
    const figures = article.querySelectorAll("figure"), photograph = figures[0].cloneNode(true);
    const picture = photograph.querySelector("img");
    photograph.querySelector(".frame").style.backgroundImage = "none";
    picture.src = picture.src.replace(/prediction-.*webp/, "photograph.webp");
    photograph.querySelector("figcaption").innerHTML = "<b>Image</b>";
    figures[figures.length - 1].after(photograph);
  }
}"""
STRIP = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; padding: 14px; width: 1000px; box-sizing: border-box; background: #fff; color: #1a1f26;
  font: 15px/1.4 system-ui, "Liberation Sans", Arial, sans-serif }
.row { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px }
figure { margin: 0 } img { width: 100%; display: block; border-radius: 6px } figcaption { margin-top: 5px }
figcaption span, .key { color: #57616d }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 10px; font-size: 13px }
i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px }
.hatch { background: repeating-linear-gradient(-45deg, #383838 0 2px, #000 2px 6px) }
</style><div class="row">[figures]</div><div class="key">[key]</div>"""


@dataclass(frozen=True)
class Extent:
    """How much is drawn and learnt: images of the city and their height, seeds, steps, crops of a step and their size.

    hero, attention: numbers of the samples of coarse.parquet that README.md and docs/networks.md show.
    """

    fine: int = 24
    coarse: int = 48
    val: int = 20
    height: int = 160
    hero: int = 27
    attention: int = 15
    seeds: int = 3
    steps: int = 190
    batch: int = 8
    crop: str = "64x96"


SMALLEST = Extent(2, 4, 1, 64, 3, 1, 1, 2, 2, "32x48")


def autolabel(*words: str | Path) -> None:
    """Run a command in this process and show it; stop if it fails."""
    print("$ autolabel", *words, flush=True)
    try:
        cli.main([str(word) for word in words], prog_name="autolabel")
    except SystemExit as end:
        if end.code:
            raise


def webp(page: Any, path: Path, **what: Any) -> None:
    """Photograph a page, or a part of it, as WebP."""
    Image.open(io.BytesIO(page.screenshot(**what))).convert("RGB").save(path, quality=82, method=6)
    print(path, Image.open(path).size, f"{path.stat().st_size / 1e3:.0f} kB")


def strip(coarse: Path, run: Path, hero: int) -> str:
    """The page of README.md's picture: photograph, coarse label, automatic label."""
    manifest = load_manifest(coarse)
    sample = manifest.samples[hero]
    assert sample.coarse_label is not None
    photograph = Image.fromarray(read_image(sample.image))
    rough = read_label(sample.coarse_label, manifest.label_space, ids=sample.label_ids)
    auto = Run.open(run).labels[sample.sample_id]
    pictures = [photograph, *(Image.blend(photograph, draw_label(label, CITYSCAPES), SHADE) for label in (rough, auto))]
    covered = [f"{100 * (label != 255).mean():.0f} % covered" for label in (rough, auto)]
    captions = [
        "<b>Image</b> <span>a drawn street</span>",
        f"<b>Coarse label</b> <span>{covered[0]}</span>",
        f"<b>Automatic label</b> <span>{covered[1]}</span>",
    ]
    figures = []
    for picture, caption in zip(pictures, captions, strict=True):
        data = io.BytesIO()
        picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS).save(data, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        figures.append(f'<figure><img src="{source}"><figcaption>{caption}</figcaption></figure>')
    key = [
        f'<span><i style="background:#{CITYSCAPES.palette[3 * c : 3 * c + 3].hex()}"></i>{name}</span>'
        for c, name in enumerate(CITYSCAPES.names)
        if (auto == c).sum() > 20 or (rough == c).any()
    ]
    key.append('<span><i class="hatch"></i>no label</span>')
    return STRIP.replace("[key]", "".join(key)).replace("[figures]", "".join(figures))


def photograph_street(browser: Any, page_text: str, docs: Path) -> None:
    """Photograph the strip of README.md."""
    page = browser.new_context(viewport={"width": 1000, "height": 300}, device_scale_factor=1.6).new_page()
    page.set_content(page_text)
    page.set_viewport_size({"width": 1000, "height": page.evaluate("document.body.offsetHeight")})
    webp(page, docs / "street.webp")


def visit(browser: Any, page: Path, width: int, scheme: str = "light", height: int = 940) -> Any:
    """Open a page of ours."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(page.resolve().as_uri())
    return opened


def scroll(page: Any, part: str, above: int = 12) -> None:
    """Bring a part of a page to the top, and wait for its pictures."""
    page.evaluate(f"scrollTo(0, document.querySelector('{part}').getBoundingClientRect().top + scrollY - {above})")
    page.wait_for_timeout(1000)


def open_viewer(page: Any, layer: str) -> None:
    """Open the fourth image of a gallery with a layer, by its key."""
    page.locator(".shot a").nth(3).click()
    page.keyboard.press(layer)
    page.wait_for_timeout(1000)


def photograph_report(browser: Any, report: Path, docs: Path) -> None:
    """Photograph gallery, viewer, plots, and four places on a phone."""
    page = visit(browser, report, 1400)
    for place, key in ((0, "r"), (2, "f"), (3, "k")):
        page.locator(".shot a").nth(place).focus()
        page.keyboard.press(key)
    page.evaluate("document.activeElement.blur()")
    scroll(page, "header")
    webp(page, docs / "report.webp")
    page = visit(browser, report, 1400, "dark")
    open_viewer(page, "5")
    webp(page, docs / "report_viewer.webp")

    page = visit(browser, report, 1400)
    page.evaluate("document.getElementById('images').hidden = true")  # cards change their height as they appear
    edges = [f"document.querySelector('{part}').getBoundingClientRect().top + scrollY" for part in PLOTS]
    top, bottom = map(page.evaluate, edges)
    clip = {"x": 0, "y": top - 20, "width": 1400, "height": bottom - top}
    webp(page, docs / "report_overview.webp", full_page=True, clip=clip)

    wide = Image.new("RGB", (4 * 400 + 3 * 16, 860), (128, 128, 128))
    for place, (scheme, part) in enumerate(PHONES):
        page = visit(browser, report, 400, scheme, height=860)
        scroll(page, part) if part else open_viewer(page, "3")
        wide.paste(Image.open(io.BytesIO(page.screenshot())), (place * 416, 0))
    wide.save(docs / "report_narrow.webp", quality=82, method=6)


def photograph_attention(browser: Any, report: Path, sample: str, docs: Path) -> None:
    """Photograph the scales of a sample."""
    page = visit(browser, report, 1040, height=400)
    page.evaluate(ALONE, sample)
    box = page.locator("#by-scale article:not([hidden])").bounding_box()
    page.set_viewport_size({"width": 1040, "height": round(box["height"]) + 20})
    scroll(page, "#by-scale article:not([hidden])")
    webp(page, docs / "attention.webp")


def photograph_polygons(browser: Any, counts: Path, docs: Path) -> None:
    """Photograph the curves of what lies around polygons."""
    card = visit(browser, counts, 1280).locator("#polygons > .card").first
    Image.open(io.BytesIO(card.screenshot())).save(docs / "report_polygons.webp", lossless=True, method=6)


def main() -> None:
    """Draw, run the commands, photograph the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    out, extent, docs = asked.out, Extent(), DOCS
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        extent, docs = SMALLEST, out / "docs"
        docs.mkdir(parents=True)
    coarse, run, human_first = out / "coarse.parquet", out / "runs" / "auto", out / "runs" / "human-first"
    write_city(
        out / "city", 0, fine=extent.fine, coarse=extent.coarse, val=extent.val, height=extent.height,
        width=2 * extent.height,
    )  # fmt: skip
    for manifest, split in ((out / "fine.parquet", "train"), (coarse, "train_extra"), (out / "val.parquet", "val")):
        autolabel("manifest", "scan", out / "city", "--split", split, "-o", manifest)
    autolabel("generate", coarse, "--teacher", asked.teacher, "--out", run, "--keep-confidence", "8")
    autolabel("relabel", run, "--policy", "human-first", "--out", human_first)
    autolabel("polygons", out / "fine.parquet", "-o", out / "polygons.json", "--page")
    report, compared = run / "report" / "index.html", out / "students"
    attention = load_manifest(coarse).samples[extent.attention].sample_id
    chromium = shutil.which("chromium")
    if chromium is None and asked.smallest:
        print("no chromium, no pictures")
        return
    with sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        photograph_street(browser, strip(coarse, human_first, extent.hero), docs)
        photograph_polygons(browser, out / "polygons.html", docs)
        autolabel("report", run)
        photograph_report(browser, report, docs)
        autolabel("report", run, "--attention", "--sample", attention)
        photograph_attention(browser, report, attention, docs)
        autolabel(
            "compare", "--fine", out / "fine.parquet", "--coarse", coarse, "--auto", run,
            "--arm", f"human-first={human_first}", "--val", out / "val.parquet", "--out", compared,
            "--seeds", str(extent.seeds), "--steps", str(extent.steps), "--batch-size", str(extent.batch),
            "--crop", extent.crop, "--ema", "0.98",
        )  # fmt: skip
        page = visit(browser, compared / "index.html", 1400, height=1046)
        page.wait_for_timeout(1000)
        webp(page, docs / "compare.webp")


if __name__ == "__main__":
    main()
