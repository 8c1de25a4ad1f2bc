"""Usage: ARRAYS TRUTH PREDICTIONS. Score the PNGs below PREDICTIONS against those below TRUTH, as benchmarks do."""

import json
import sys
from pathlib import Path

from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

_, truth, predictions = sys.argv[1:]
settings = official.args
settings.evalInstLevelScore, settings.JSONOutput, settings.quiet = False, False, True
settings.predictionPath, settings.predictionWalk = predictions, None
wanted = [str(path) for path in sorted(Path(truth).rglob("*_gtFine_labelIds.png"))]
found = [official.getPrediction(settings, path) for path in wanted]
result = official.evaluateImgLists(found, wanted, settings)
print(json.dumps({"images": len(wanted), "iou": result["classScores"], "mean": result["averageScoreClasses"]}))
