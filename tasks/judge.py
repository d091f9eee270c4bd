"""The judge: a language model behind an OpenAI-compatible endpoint that gives points.

What it is asked is in graded.py."""

import hashlib
import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from chat import is_text

POINTS = re.compile(
    r"(?:total score|总分)\s*(?:[(（\[][^)）\]]*[)）\]])?\s*"  # a bracket may name the scale
    r"(?:is|是|为)?\s*[:：=]?\s*[(\[]?(\d+(?:\.\d+)?)",
    re.IGNORECASE,
)
BARE_POINTS = re.compile(r"\s*(?:score\s*:?\s*)?(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\s.]*", re.IGNORECASE)
SECONDS = 120.0  # that one request may take
PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the tries of a request
REQUESTS = 8  # at a time
FAILURES = (OSError, http.client.HTTPException)  # another try may succeed


class JudgeError(ValueError):
    """A wrong address, key or model: another try would fail, too."""


def read_points(reply: str | None) -> float | None:
    """Returns the points of a reply, divided by 10: the number after "total score", or the only
    thing that the reply says. None if there is no number from 0 to 10."""
    text = (reply or "").replace("*", "")
    found = POINTS.search(text) or BARE_POINTS.fullmatch(text)
    return float(found[1]) / 10 if found and float(found[1]) <= 10 else None


@dataclass
class Judge:
    """Asks `model` at `url` (the part before /chat/completions; empty: nobody). Every reply is kept
    in the file `replies`, so that nothing is asked twice."""

    url: str
    model: str
    key: str
    replies: Path
    known: dict[str, str] = field(default_factory=dict)  # digest of model and text -> reply
    failed: bool = False  # whether a try has failed; the first one is printed
    lost: int = 0  # texts in a row that got no reply

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge_url is {self.url!r}; must begin with http:// or https://")
        self.key = self.key.strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        if self.replies.exists():
            for line in self.replies.read_text("utf-8", errors="replace").split("\n"):
                with suppress(ValueError, TypeError, KeyError):  # a kill cut the line off
                    row = json.loads(line)
                    if is_text(row["reply"]):
                        self.known[row["asked"]] = row["reply"]

    def check(self) -> None:
        """Raises JudgeError if a first request does: better now than after decoding."""
        with suppress(*FAILURES):  # the judge may be there by then
            self.request("Reply with the word yes.")

    def digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.model}\n{text}".encode()).hexdigest()

    def points(self, texts: list[str]) -> list[float | None]:
        """Returns the points of each text, from 0 to 1; None without any. Raises JudgeError."""
        self.lost = 0
        known = {self.digest(text): text for text in texts}
        missing = [d for d in known if read_points(self.known.get(d)) is None]
        if missing and self.url:
            print(f"judge: {len(missing)} of {len(texts)} to ask {self.model}", flush=True)
            self.ask_all({d: known[d] for d in missing})
        unread = [r for d in known if (r := self.known.get(d)) and read_points(r) is None]
        if unread:
            print(f"judge: {len(unread)} replies without points, as {unread[0]!r:.100}", flush=True)
        return [read_points(self.known.get(self.digest(text))) for text in texts]

    def ask_all(self, texts: dict[str, str]) -> None:
        """Asks about each text (by digest), and keeps the replies as they come in."""
        stop = threading.Event()
        self.replies.parent.mkdir(parents=True, exist_ok=True)
        with open(self.replies, "a", encoding="utf-8") as out, ThreadPoolExecutor(REQUESTS) as pool:
            if out.tell() > 0:
                out.write("\n")  # ends a line that a kill cut off
            try:
                asked = {pool.submit(self.ask, text, stop): d for d, text in texts.items()}
                done = tqdm(as_completed(asked), "judge", len(asked), leave=False, disable=None)
                for future in done:
                    if (reply := future.result()) is not None:
                        self.known[asked[future]] = reply
                        row = {"asked": asked[future], "model": self.model, "reply": reply}
                        out.write(json.dumps(row) + "\n")
                        out.flush()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def ask(self, text: str, stop: threading.Event) -> str | None:
        """Returns the judge's reply; None after the last try, and once REQUESTS texts in a row got
        none. Raises JudgeError."""
        for pause in (*PAUSES, None):
            if self.lost >= REQUESTS:
                return None
            try:
                reply = self.request(text)
                self.lost = 0
                return reply
            except FAILURES as error:
                reason = f"judge: {self.url}: {type(error).__name__}: {error}"
                if isinstance(error, urllib.error.HTTPError):
                    if error.code not in (408, 409, 425, 429) and error.code < 500:
                        print(f"{reason}; no points for one text", flush=True)
                        return None
                    after = error.headers.get("Retry-After", "")
                    if pause is not None and after.isdecimal():
                        pause = max(pause, min(int(after), 600))
            if not self.failed:
                self.failed = True
                print(f"{reason}; asked again for {sum(PAUSES)} seconds and more", flush=True)
            if pause is None or stop.wait(pause):
                break
        self.lost += 1
        return None

    def request(self, text: str) -> str:
        """Returns the reply to one request. Raises JudgeError, or one of FAILURES."""
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            with suppress(*FAILURES):
                error.msg = error.read(300).decode(errors="replace")  # the server's own words
            if error.code in (401, 403, 404):
                raise JudgeError(f"{self.url}: {error}") from None
            raise
        with suppress(ValueError, KeyError, IndexError, TypeError):
            reply = json.loads(answer)["choices"][0]["message"]["content"]
            if is_text(reply):
                return reply
        begins = answer[:80].decode(errors="replace")
        raise http.client.HTTPException(f"no text in choices[0].message.content: {begins!r}")
