"""Commands that are not there: each records its arguments and what it read, and answers as it is told."""

import json
import sys
from pathlib import Path

_FAKE = """#!{python} -IS
import json, pathlib, sys
folder = pathlib.Path({folder!r})
name = pathlib.Path(sys.argv[0]).name
stdin = "" if sys.stdin.isatty() else sys.stdin.read()
stdin += "".join(pathlib.Path(arg).read_text() for arg in sys.argv[1:] if arg.endswith(".yaml"))
with (folder / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({{"command": [name, *sys.argv[1:]], "stdin": stdin}}) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
for verb, queue in answers.items():
    if verb in sys.argv:
        answer = queue.pop(0) if queue else {{"status": 99, "err": "one call more than the test expects"}}
        (folder / "answers.json").write_text(json.dumps(answers))
        print(answer.get("out", ""))
        print(answer.get("err", ""), file=sys.stderr)
        sys.exit(answer.get("status", 0))
"""


class FakeCommands:
    def __init__(self, folder: Path, monkeypatch, *names: str) -> None:
        self._folder = folder
        self.answer()
        for name in names:
            path = folder / name
            path.write_text(_FAKE.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)
        # Nothing else of that name may be found.
        monkeypatch.setenv("PATH", f"{folder}:/nowhere")

    def answer(self, **queues) -> None:
        """Answers to calls that have the word among their arguments, one for each call in turn and then errors; calls
        without such a word succeed."""
        (self._folder / "answers.json").write_text(json.dumps(queues))

    @property
    def calls(self) -> list[list[str]]:
        return [call["command"] for call in self._records]

    @property
    def inputs(self) -> list[str]:
        return [call["stdin"] for call in self._records]

    @property
    def _records(self):
        path = self._folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
