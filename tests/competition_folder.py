"""Little competitions on disk: of made-up rows and images, or of some rows of the demo."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import vqa_helpers as vqa


def picture(seed, size=(48, 36)):
    """An image unlike any other seed's: eight by six random colours, smoothly enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


class Folder:
    """`n` rows a split, one image each, answers a, b, c, d in turn."""

    def __init__(self, root, n=4):
        self.root = root
        for split, first_seed in (("train", 0), ("test", 1000)):
            (root / split).mkdir()
            for number in range(n):
                picture(first_seed + number).save(root / split / f"{number}.png")
        row = "{0}_{1},{0}/{1}.png,무슨 색입니까?,빨강,파랑,노랑,초록"
        train = [row.format("train", number) + "," + "abcd"[number % 4] for number in range(n)]
        test = [row.format("test", number) for number in range(n)]
        sample = [f"test_{number}," for number in range(n)]
        self.write("train", "id,path,question,a,b,c,d,answer", train)
        self.write("test", "id,path,question,a,b,c,d", test)
        self.write("sample_submission", "id,answer", sample)

    def write(self, name, header, rows):
        (self.root / f"{name}.csv").write_text("\n".join([header, *rows]), encoding="utf-8")

    def load(self, share=0.0, **options):
        return vqa.load_competition(self.root, max_fallback_share=share, **options)


def counted_fallbacks(competition):
    return {name: count for name, count in competition.fallbacks.items() if count}


def copy_demo_rows(folder: Path, train: int, test: int) -> Path:
    """Make a competition of the demo's first training and test rows in this folder."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", test), ("sample_submission", test)):
        frame = pd.read_csv(vqa.DEMO / f"{name}.csv", dtype=str, keep_default_na=False).head(rows)
        frame.to_csv(folder / f"{name}.csv", index=False)
        for path in frame.get("path", ()):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(vqa.DEMO / "images" / path, folder / path)
    return folder
