"""Write 240 everyday prompts that ask for one short sentence, to try on-policy training without data of one's own.

python examples/everyday_prompts.py prompts.jsonl
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

TEMPLATES = (
    "Tell me about {}.",
    "Why do people like {}?",
    "What should a beginner know about {}?",
    "Explain {} to a child.",
    "What is the history of {}?",
    "Give me advice about {}.",
)
TOPICS = (
    *("bread", "chess", "bicycles", "rain", "tea", "gardens", "maps", "libraries", "bridges", "salt"),
    *("owls", "trains", "paper", "clocks", "honey", "mountains", "radio", "glass", "dogs", "kites"),
    *("rivers", "soap", "lighthouses", "music", "ice", "cotton", "stars", "markets", "pencils", "wind"),
    *("bees", "boats", "candles", "apples", "wool", "walking", "windows", "cheese", "snow", "letters"),
)


def main() -> None:
    """Write the file that is named on the command line."""
    prompts = [template.format(topic) for topic, template in itertools.product(TOPICS, TEMPLATES)]
    rows = [{"prompt": [{"role": "user", "content": f"{prompt} Answer in one short sentence."}]} for prompt in prompts]
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
