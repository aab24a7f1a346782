"""Training and checks of a real TiDAR model on one GPU, with torch, tokenizers and transformers alone.

    real_model.py corpus  --out .carry/corpus                          gather this machine's text (not on the GPU)
    real_model.py smoke   --report DIR                                 a minute: everything once, with projections
    real_model.py train   --corpus .carry/corpus --out DIR --report DIR  tokenizer, AR phase, dual phase, bundle, curves
    real_model.py mfu     --shape qwen2.5-1.5b --report DIR            AR and dual train step, by form of attention

Weights stay in --out; --report holds small files alone.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def main() -> None:
    """Run one of the five commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--out", type=Path, default=ROOT / ".carry/corpus")
    corpus.add_argument("--site-packages", type=Path, required=True, help="folder of the virtual environment")
    prepare = commands.add_parser("prepare", help="the part of `train` that runs beside compilation")
    train, smoke, mfu = (commands.add_parser(name) for name in ("train", "smoke", "mfu"))
    for command in (prepare, train):
        command.add_argument("--corpus", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--sample-mb", type=float, default=24, help="megabytes of text to train the tokenizer on")
    for command in (train, smoke, mfu):
        command.add_argument("--report", type=Path, required=True)
        command.add_argument("--rows-per-step", type=int, default=64)
        command.add_argument("--rows-per-forward", type=int, default=32)
        command.add_argument("--eager", action="store_true", help="compile FlexAttention alone")
    for command in (prepare, train, smoke, mfu):
        command.add_argument("--shape", default="qwen3-125m")
        command.add_argument("--row-len", type=int, default=1024)
    for command in (train, smoke, mfu):
        command.add_argument("--block-len", type=int, default=16)
        command.add_argument("--link-rank", type=int, default=0, help="rank of the link between drafts; 0: no link")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default=None)
    train.add_argument(
        "--seconds", type=float, default=600, help="training time of both phases; --wall-seconds limits it too"
    )
    train.add_argument("--wall-seconds", type=float, default=540, help="total time, from start to exit")
    train.add_argument(
        "--reserve-seconds", type=float, default=30, help="time kept for the last evaluation and the bundle"
    )
    train.add_argument("--ar-share", type=float, default=0.45)
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--dual-learning-rate", type=float, default=8e-4)
    smoke.add_argument("--steps", type=int, default=20)
    smoke.add_argument("--out", type=Path, default=Path("/tmp/tidar-smoke"))
    mfu.add_argument("--steps", type=int, default=4)
    mfu.add_argument("--forms", default="flex,sdpa", help="comma-separated: flex, sdpa, split")
    mfu.set_defaults(shape="qwen2.5-1.5b", row_len=2048, rows_per_step=8, rows_per_forward=2)
    arguments = parser.parse_args()
    arguments.began = time.perf_counter()
    globals()[f"_{arguments.command}"](arguments)


def _corpus(arguments: argparse.Namespace) -> None:
    from corpus import gather, write_corpus

    print(json.dumps(write_corpus(gather(arguments.site_packages), arguments.out)))


def _prepare(arguments: argparse.Namespace) -> None:
    from rows import prepare

    prepare(arguments.corpus, arguments.out, arguments.shape, arguments.row_len, arguments.sample_mb)


def _train(arguments: argparse.Namespace) -> None:
    from run import train

    own = ("corpus", "out", "sample_mb", "shape", "row_len")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in own]
    preparing = subprocess.Popen([sys.executable, __file__, "prepare", *options])
    try:
        train(arguments, preparing)
    finally:
        if preparing.poll() is None:
            preparing.kill()


def _smoke(arguments: argparse.Namespace) -> None:
    from checks import smoke

    smoke(arguments)


def _mfu(arguments: argparse.Namespace) -> None:
    from checks import mfu

    mfu(arguments)


if __name__ == "__main__":
    main()
