"""How does one GPU train and check a real TiDAR model, with torch, tokenizers and transformers alone?

    real_model.py corpus  --out .carry/corpus                          gather this machine's text (not on the GPU)
    real_model.py smoke   --report DIR                                 a minute: everything once, and what to expect
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
    """Run one of the five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--out", type=Path, default=ROOT / ".carry/corpus")
    corpus.add_argument("--site-packages", type=Path, required=True, help="of the virtual environment")
    prepare = commands.add_parser("prepare", help="what `train` runs beside its compilation")
    train, smoke, mfu = (commands.add_parser(name) for name in ("train", "smoke", "mfu"))
    for command in (prepare, train):
        command.add_argument("--corpus", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--sample-mb", type=float, default=24, help="text that the tokenizer is trained on")
    for command in (train, smoke, mfu):
        command.add_argument("--report", type=Path, required=True)
        command.add_argument("--rows-per-step", type=int, default=64)
        command.add_argument("--rows-per-forward", type=int, default=32)
        command.add_argument("--eager", action="store_true", help="compile nothing but FlexAttention")
    for command in (prepare, train, smoke, mfu):
        command.add_argument("--shape", default="qwen3-125m")
        command.add_argument("--row-len", type=int, default=1024)
    for command in (train, smoke, mfu):
        command.add_argument("--block-len", type=int, default=16)
        command.add_argument("--link-rank", type=int, default=0, help="of a link between drafts; 0: none")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default=None)
    train.add_argument("--seconds", type=float, default=600, help="of training, both phases; the wall limits it too")
    train.add_argument("--wall-seconds", type=float, default=540, help="of everything, from start to exit")
    train.add_argument("--reserve-seconds", type=float, default=30, help="kept for the last evaluation and the bundle")
    train.add_argument("--ar-share", type=float, default=0.45)
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--dual-learning-rate", type=float, default=8e-4)
    smoke.add_argument("--steps", type=int, default=20)
    smoke.add_argument("--out", type=Path, default=Path("/tmp/tidar-smoke"))
    mfu.add_argument("--steps", type=int, default=4)
    mfu.add_argument("--forms", default="flex,sdpa", help="of flex, sdpa, split")
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
