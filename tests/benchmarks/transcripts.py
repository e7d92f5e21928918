"""The speed of transcribe_images at real size, and whether it goes on after a kill.

    python tests/benchmarks/transcripts.py           # a GPU: a random Qwen3-VL-8B in 4-bit
    python tests/benchmarks/transcripts.py --tiny    # the demo's model: does everything run?

The images are the demo's, enlarged to 512 pixels. Prints the seconds of the whole, images/s
without loading, then kills a second process (SIGKILL) after its second batch, lets a third go on,
and says whether its file is that of the first, byte by byte. Random weights hardly ever end a
text, so that each image takes all its 96 tokens: the slowest that it can be.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402
from rehearsal import enlarge_demo  # noqa: E402

import vqa_helpers as vqa  # noqa: E402


def batches_in(texts: Path) -> list[dict]:
    """The batches that a process has kept, with the time of each."""
    return vqa.read_json_lines(texts, {"texts": dict})


def read_all(config: vqa.Config) -> Path:
    """Transcribe all images and print the seconds; the file."""
    start = time.perf_counter()
    path = vqa.transcribe_images(config, vqa.QUESTION_TYPES)
    sys.stdout.write(f"\n{time.perf_counter() - start:.1f} s with loading\n")
    sys.stdout.flush()
    return path


def kill_after_two_batches(folder: Path) -> None:
    """Begin again in this folder, and end the process with SIGKILL."""
    texts = folder / "texts.jsonl"
    command = [sys.executable, vqa.__file__, "transcribe", "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(batches_in(texts)) < 2:
        time.sleep(0.02)
    process.kill()
    status = process.wait()
    sys.stdout.write(f"killed: status {status}, {len(batches_in(texts))} batches were kept\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the demo's model on this CPU")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16, help="images in a batch")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    start = time.perf_counter()
    if options.tiny:
        model = vqa.DEMO / "tiny_qwen3_vl"
    else:
        model = bench_gpu.build(bench_gpu.SIZES["8b"], place)
    pixels = 96 if options.tiny else 512
    data = enlarge_demo(place / "data", rows=options.images, pixels=pixels, test_rows=1)
    sys.stdout.write(f"built in {time.perf_counter() - start:.0f} s\n")
    config = vqa.Config.preset(
        "demo",
        model_id=str(model),
        data_dir=str(data),
        output_dir=str(place / "outputs"),
        max_fallback_share=0.5,
        max_pixels=pixels * pixels,
        quantization="none" if options.tiny else "4bit",
        infer_batch_size=options.batch,
    )
    path = read_all(config)
    before = path.read_bytes()
    texts = path.with_name("texts.jsonl")
    batches = batches_in(texts)
    read = sum(len(batch["texts"]) for batch in batches[1:])  # the first one warms up
    speed = read / (batches[-1]["time"] - batches[0]["time"])
    lengths = [len(text) for batch in batches for text in batch["texts"].values()]
    sys.stdout.write(
        f"{speed:.2f} images/s in batches of {options.batch}; "
        f"texts of {min(lengths)} to {max(lengths)} characters\n"
    )
    texts.unlink()
    path.unlink()
    kill_after_two_batches(path.parent)
    is_same = read_all(config).read_bytes() == before
    sys.stdout.write(f"the file after the kill is the same: {is_same}\n")


if __name__ == "__main__":
    main()
