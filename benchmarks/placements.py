"""Measures seconds and peak memory of PPO under ZeRO-2, for each placement of the frozen models.

A random GPT-NeoX of a Pythia's shape, prompts as long as the paper's, responses of 53 tokens (a random one ends none).
Each placement is a run of `train.py fit` of its own, whose curves give the figures of its last update.

    python benchmarks/placements.py --size 1b --episodes 512 --micro_batch 16 --rollout_batch 64   # one GPU of 80 GB
    python benchmarks/placements.py --size tiny --episodes 8 --micro_batch 2 --rollout_batch 4     # any machine
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rlhf.models.scalar_model import ScalarModel  # noqa: E402
from rlhf.models.tokenizers import load_tokenizer  # noqa: E402
from rlhf.report.curve_files import read_curves  # noqa: E402
from rlhf.synthetic.posts import demonstrations  # noqa: E402
from rlhf.synthetic.synthesize import train_tokenizer  # noqa: E402

SIZES = {  # hidden size, layers, heads, vocabulary
    "tiny": (64, 2, 2, 2048),
    "1b": (2048, 16, 8, 50304),
    "2.8b": (2560, 32, 32, 50304),
    "6.9b": (4096, 32, 32, 50432),
}
PHASES = ("sampling", "values", "reference", "reward", "training", "update")


def write_models(folder: Path, size: str) -> None:
    """Writes random models, `folder/policy` and `folder/reward`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    hidden, layers, heads, vocabulary = SIZES[size]
    tokenizer = train_tokenizer((r["post"] for r in demonstrations(500, 1, "train")), 1024)
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    ScalarModel.from_policy(str(folder / "policy"), 1).save(folder / "reward", load_tokenizer(str(folder / "policy")))


def write_prompts(folder: Path, count: int) -> Path:
    """Writes prompts of about 200 to 500 tokens: several posts in a row."""
    posts = [r["post"] for r in demonstrations(count * 6, 1, "train")]
    file = folder / "prompts.jsonl"
    tokenizer = load_tokenizer(str(folder / "policy"))
    with file.open("w") as stream:
        for row in range(count):
            text = " ".join(posts[row * 6 : row * 6 + 2 + row % 5])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:500]
            stream.write(json.dumps({"prompt": tokenizer.decode(ids)}) + "\n")
    return file


def measure(folder: Path, prompts: Path, placement: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs one placement and returns the curves of its last update."""
    run = folder / placement
    words = [
        "fit", "--model=PPOModule", "--data=RolloutDataModule", f"--run_dir={run}",
        f"--model.model_path={folder}/policy", f"--model.reward_path={folder}/reward", f"--data.train.path={prompts}",
        f"--data.batch_size={options.episodes}", f"--data.micro_batch_size={options.micro_batch}",
        f"--data.rollout_batch_size={options.rollout_batch}", f"--trainer.max_epochs={options.updates}",
        f"--model.reference_placement={placement}", f"--model.reward_placement={placement}",
        f"--trainer.devices={options.devices}", "--trainer.strategy=zero2", "--trainer.log_every_n_steps=1",
        "--trainer.enable_checkpointing=false",
    ]  # fmt: skip
    words += ["--trainer.precision=bf16-mixed"] if torch.cuda.is_available() else ["--trainer.accelerator=cpu"]
    if options.activation_checkpointing:
        words.append("--model.activation_checkpointing=true")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, cwd=ROOT)
    curves = read_curves(run)
    names = [f"seconds/{phase}" for phase in PHASES] + ["memory/peak_gib", "invariants/ratio", "eps"]
    return {name: float(curves[name].iloc[-1]) for name in names}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--placements", nargs="+", default=["device", "cpu", "zero3"])
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--rollout_batch", type=int, default=4)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--activation_checkpointing", action="store_true")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.size)
        prompts = write_prompts(folder, max(options.episodes * options.updates, 64))
        title = f"{device} x {options.devices}, {options.size}, {options.episodes} episodes per update"
        print(f"\n{title}, seconds per phase:\n", flush=True)
        print("| placement | " + " | ".join(PHASES) + " | peak GiB | largest ratio deviation | episodes/s |")
        print("|---" * (len(PHASES) + 4) + "|", flush=True)
        for placement in options.placements:
            row = measure(folder, prompts, placement, options)
            seconds = " | ".join(f"{row[f'seconds/{phase}']:.2f}" for phase in PHASES)
            rest = f"{row['memory/peak_gib']:.2f} | {row['invariants/ratio']:.1e} | {row['eps']:.2f}"
            print(f"| {placement} | {seconds} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
