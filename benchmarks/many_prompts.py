"""What a comparison of many prompts costs: time and peak memory of every stage, and what its page weighs.

A tiny random model of 1,024 words is compared with two of its recipes on 500, 1,000 and 2,000 prompts, 64 tokens each,
every number in a process of its own. Time should double with the prompts and peak memory stay; `held` is memory that is
not backed by a file and is sampled every 5 ms. What grows with the tokens are the states, T × d numbers a model, and
the row statistics; T × V would be 128,000 × 1,024 × 4 = 524 MB a model. Chromium opens the page from the disk, three
times; the time is that until it has drawn the figures that can be seen.

    python benchmarks/many_prompts.py [--prompts 500 1000 2000] [--tokens 64] [--keep FOLDER]
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WORDS = 1024
COST = "cost.json"
RECIPES = ("drop-attention:1", "drop-mlp:1+drop-attention:1")


class Held:
    """The most memory without a file behind it (MB) while the body runs."""

    def __enter__(self) -> "Held":
        self.most, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, float(status.split("RssAnon:")[1].split()[0]) / 1024)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def vocabulary() -> list[str]:
    """Words of two to eight letters, a few with marks that HTML would read."""
    starts, middles, ends = (
        "b c d f g k l m n p r s t v z th".split(),
        "a e i o u ai ou ea".split(),
        "n r s t l m d <".split(),
    )
    return [start + middle + end for start in starts for middle in middles for end in ends]


def tiny() -> Any:
    """A random Llama whose next token is fairly certain, with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from prunelens.models.opening.loading import wrap

    names = ["<pad>", "<bos>", "<eos>", *(f"▁{word}" for word in vocabulary())][:WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
        )
    ).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    network.get_output_embeddings().weight.data.mul_(3)
    return wrap(network, fast, "tiny")


def prompts(count: int) -> list[Any]:
    """Different prompts of a dozen words; every fourth one has options."""
    import random

    from prunelens.tasks.prompts import PromptText

    draw, names = random.Random(0), vocabulary()[: WORDS - 3]
    texts = [" ".join(draw.choices(names, k=12)) for _ in range(count)]
    return [
        PromptText(
            f"prompt-{number}",
            ("story", "list", "code", "choice")[number % 4],
            ({"role": "user", "content": text},),
            tuple(draw.sample(names, 3)) if number % 4 == 3 else (),
        )
        for number, text in enumerate(texts)
    ]


def compare(count: int, tokens: int, folder: Path) -> None:
    """One comparison and its page, and a file on what it cost (child process)."""
    import resource

    from prunelens.api import compare as run_compare

    model = tiny()
    texts = prompts(count)
    warm = {"max_new_tokens": 4, "chat_template": False}
    run_compare(model, *RECIPES, prompts=texts[:4], **warm).report(folder / "warm")
    with Held() as held:
        start, began = time.perf_counter(), time.process_time()
        found = run_compare(model, *RECIPES, prompts=texts, max_new_tokens=tokens, chat_template=False)
        middle, most = time.perf_counter(), held.most
        page = found.report(folder / "run")
        end, busy = time.perf_counter(), time.process_time() - began
    seconds = dict(found.info["seconds"])
    seconds |= {"tables and summary": middle - start - sum(seconds.values()), "writing run and page": end - middle}
    answer = {
        "seconds": seconds,
        "all": end - start,
        "busy": busy,
        "held": held.most,
        "held before page": most,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes": {path.name: path.stat().st_size for path in page.parent.iterdir()},
    }
    (folder / COST).write_text(json.dumps(answer))


def opening(page: Path, width: int = 1300) -> list[float]:
    """Seconds until Chromium shows the page with its figures, three times; empty without Chromium."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        return []
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--window-size={width},2000"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        found = []
        for _ in range(3):
            driver.get("about:blank")
            start = time.perf_counter()
            driver.get(page.as_uri())
            while driver.execute_script("return document.documentElement.dataset.figures") != "drawn":
                time.sleep(0.01)
            found.append(time.perf_counter() - start)
        return found
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="leave the runs here")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        compare(int(options.child[0]), options.tokens, Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = {count: measured(count, options, options.keep or Path(scratch)) for count in options.prompts}
    for small, large in itertools.pairwise(found):
        ratios = {name: found[large][name] / found[small][name] for name in ("busy", "all", "held")}
        print(
            f"{large} over {small} prompts: processor time {ratios['busy']:.2f}, time {ratios['all']:.2f}, "
            f"held {ratios['held']:.2f}"
        )


def measured(count: int, options: argparse.Namespace, parent: Path) -> dict[str, Any]:
    """What a comparison cost, printed; one that `--keep` has kept is not made again."""
    folder = (parent / str(count)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / COST).exists():
        command = [sys.executable, __file__, "--tokens", str(options.tokens), "--child", str(count), str(folder)]
        subprocess.run(command, check=True)
    answer: dict[str, Any] = json.loads((folder / COST).read_text())
    stages = ", ".join(f"{name} {value:.1f}" for name, value in answer["seconds"].items() if value >= 0.05)
    weights = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(answer["bytes"].items()) if size > 50_000)
    opened = opening(folder / "run" / "report.html")
    print(f"{count} prompts: {answer['busy']:.1f} s of the processor in {answer['all']:.1f} s ({stages})")
    print(
        f"  held at most {answer['held']:.0f} MB ({answer['held before page']:.0f} before the page), with mapped files "
        f"{answer['resident']:.0f} MB"
    )
    print(f"  on disk, MB: {weights}")
    if opened:
        print(f"  opens in {statistics.median(opened):.2f} s ({min(opened):.2f} to {max(opened):.2f})", flush=True)
    return answer


if __name__ == "__main__":
    main()
