"""Make the pictures of README.md and docs/ from drawn streets: `python benchmarks/pictures.py TEACHER OUT`.

The streets are drawn by manifests/scenes.py, so the pictures have the project's own licence. The script runs the
commands as a user types them, opens the report in the system's Chromium, and photographs it. TEACHER is a checkpoint
that knows drawn streets. Needs `pip install '.[test]'`, and chromium on the PATH.
"""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from autolabel.manifests.drawing import draw_label
from autolabel.manifests.images import read_image, read_label
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scenes import write_city

HERO = 27  # the sample of coarse.parquet that README.md shows
SHADE = 0.8  # opacity of the colours of a label over its photograph
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


def autolabel(*words: str | Path) -> None:
    """Run a command and show it."""
    print("$ autolabel", *words, flush=True)
    subprocess.run([sys.executable, "-m", "autolabel", *map(str, words)], check=True)


def webp(page: Any, path: Path, **what: Any) -> None:
    """Photograph a page, or a part of it, as WebP."""
    Image.open(io.BytesIO(page.screenshot(**what))).convert("RGB").save(path, quality=82, method=6)
    print(path, Image.open(path).size, f"{path.stat().st_size / 1e3:.0f} kB")


def strip(coarse: Path, run: Path) -> str:
    """The page of README.md's picture: photograph, coarse label, automatic label."""
    manifest = load_manifest(coarse)
    sample = manifest.samples[HERO]
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


def main(teacher: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    work, docs = out / "work", Path(__file__).resolve().parent.parent / "docs"
    coarse, run, human_first = work / "coarse.parquet", work / "runs" / "auto", work / "runs" / "human-first"
    write_city(work / "city", 0, fine=0, coarse=48, val=0)
    autolabel("manifest", "scan", work / "city", "--split", "train_extra", "-o", coarse)
    autolabel("generate", coarse, "--teacher", teacher, "--out", run, "--keep-confidence", "8")
    autolabel("relabel", run, "--policy", "human-first", "--out", human_first)
    autolabel("report", run)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )

        def visit(width: int, scheme: str, height: int = 940, scale: float = 1) -> Any:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
            )
            page = context.new_page()
            page.goto((run / "report" / "index.html").resolve().as_uri())
            return page

        page = visit(1000, "light", scale=1.6)
        page.set_content(strip(coarse, human_first))
        page.set_viewport_size({"width": 1000, "height": page.evaluate("document.body.offsetHeight")})
        webp(page, docs / "street.webp")

        page = visit(1400, "light")
        page.locator("#images").scroll_into_view_if_needed()
        page.evaluate("scrollTo(0, document.querySelector('#images').getBoundingClientRect().top + scrollY - 20)")
        page.wait_for_timeout(500)
        webp(page, docs / "report.webp")

        page = visit(1400, "dark")
        page.locator(".shot a").nth(3).click()
        page.keyboard.press("5")
        page.wait_for_timeout(500)
        webp(page, docs / "report_viewer.webp")

        page = visit(1400, "light")
        top, bottom = (
            page.evaluate(f"document.querySelector('{part}').getBoundingClientRect().top + scrollY")
            for part in ("#classes", "#images")
        )
        clip = {"x": 0, "y": top - 20, "width": 1400, "height": bottom - top}
        webp(page, docs / "report_overview.webp", full_page=True, clip=clip)

        shots = []
        for scheme, part in (("light", "header"), ("dark", "#confidence"), ("light", "#images"), ("dark", "viewer")):
            page = visit(400, scheme, height=860)
            if part == "viewer":
                page.locator(".shot a").nth(3).click()
                page.keyboard.press("3")
            else:
                page.evaluate(
                    f"scrollTo(0, document.querySelector('{part}').getBoundingClientRect().top + scrollY - 12)"
                )
            page.wait_for_timeout(500)
            shots.append(Image.open(io.BytesIO(page.screenshot())))
        wide = Image.new("RGB", (4 * 400 + 3 * 16, 860), (128, 128, 128))
        for place, shot in enumerate(shots):
            wide.paste(shot, (place * 416, 0))
        wide.save(docs / "report_narrow.webp", quality=82, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
