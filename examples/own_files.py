"""Writes small files in the format of your own: demonstrations, comparisons, prompts; for docs/your-data.md.

python -m examples.own_files my
"""

import json
import sys
from pathlib import Path

from rlhf.synthetic.posts import comparisons, demonstrations


def question(post: dict[str, str]) -> str:
    """Makes a prompt of a post."""
    return f"{post['title']}\n\n{post['post']}\n\nIn one sentence:"


def main(folder: str) -> None:
    """Writes `sft.jsonl`, `pairs.jsonl` and `prompts.jsonl`."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sft.jsonl").open("w") as file:
        for record in demonstrations(320, 1, "train"):
            row = {"prompt": question(record), "completion": f" {record['summary']}"}
            file.write(json.dumps(row) + "\n")
    with (out / "pairs.jsonl").open("w") as file:
        for record in comparisons(320, 1, "train"):
            texts = [f" {summary['text']}" for summary in record["summaries"]]
            chosen, rejected = texts[record["choice"]], texts[1 - record["choice"]]
            row = {"prompt": question(record["info"]), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")
    with (out / "prompts.jsonl").open("w") as file:
        for record in demonstrations(320, 2, "train"):
            file.write(json.dumps({"prompt": question(record)}) + "\n")
    print(f"{out}: 320 demonstrations, 320 comparisons, 320 prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
