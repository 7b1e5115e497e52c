"""The recogniser's child without a model: finds the names that its folder lists, and misbehaves when told to.

Speaks the lines of `labeling/name_recogniser_child.py`. names.json of the folder is a list of them; behaviour.txt holds
one word for the start: missing, unfit, die or hang. The texts CRASH, HANG, GARBAGE, SHIFT and FAIL do what they say.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
NAMES = json.loads((FOLDER / "names.json").read_text())
FOREVER = 3600


def main() -> None:
    with (FOLDER / "starts.txt").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    behaviour = FOLDER / "behaviour.txt"
    match behaviour.read_text() if behaviour.exists() else "":
        case "missing" | "unfit" as code:
            return tell({"error": {"code": code, "message": "no such thing"}})
        case "die":
            os._exit(3)
        case "hang":
            time.sleep(FOREVER)
    tell({"ready": {"name": "fake", "version": "1", "spacy": "0"}})
    for line in sys.stdin:
        texts = json.loads(line)["texts"]
        with (FOLDER / "asked.txt").open("a") as asked:
            asked.write(f"{len(texts)} {sum(map(len, texts))}\n")
        tell(answer(texts))
    return None


def answer(texts: list[str]) -> Any:
    said = " ".join(texts)
    if "CRASH" in said:
        os._exit(9)
    if "HANG" in said:
        time.sleep(FOREVER)
    if "GARBAGE" in said:
        return {"names": "none"}
    if "SHIFT" in said:
        return {"names": [[[0, 10**6]] for _ in texts]}
    if "FAIL" in said:
        return {"error": {"code": "not_read", "message": "ValueError"}}
    return {
        "names": [[match.span() for name in NAMES for match in re.finditer(re.escape(name), text)] for text in texts]
    }


def tell(message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
