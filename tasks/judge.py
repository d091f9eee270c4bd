"""The judge: a language model behind an OpenAI-compatible endpoint that gives points.

What it is asked is in graded.py, and how its replies are read in verdict.py."""

import hashlib
import http.client
import json
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from chat import is_text
from tasks.verdict import read_points

SECONDS = 120.0  # that one request may take
PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the tries of a request
REQUESTS = 8  # at a time
FAILURES = (OSError, http.client.HTTPException)  # another try may succeed
OF_ONE_TEXT = (400, 413, 422)  # HTTP errors that concern one text alone


class JudgeError(ValueError):
    """The endpoint cannot judge: a wrong address, key or model, for example."""


class Refused(Exception):
    """The endpoint does not grade this text. Another try would fail, too."""


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
    refused: list[str] = field(default_factory=list)  # why, for each text that gets no points
    options: dict = field(default_factory=lambda: {"temperature": 0})

    def __post_init__(self) -> None:
        if self.url and not re.match("https?://[^/?#]", self.url):
            needed = "must begin with http:// or https:// and a host"
            raise ValueError(f"judge_url is {self.url!r}; {needed}")
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
        """Makes a first request: better now than after decoding. Raises JudgeError if the endpoint
        cannot judge, and prints a warning for what may pass."""
        try:
            self.request("Reply with the word yes.")
        except Refused as error:
            raise JudgeError(f"{self.url}: {error!s:.300}") from None
        except FAILURES as error:
            reason = f"{self.url}: {type(error).__name__}: {error!s:.300}"
            print(f"warning: judge: {reason}; asked again after decoding", flush=True)

    def digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.model}\n{text}".encode()).hexdigest()

    def points(self, texts: list[str]) -> list[float | None]:
        """Returns the points of each text, from 0 to 1; None without any. Raises JudgeError."""
        self.lost, self.refused = 0, []
        known = {self.digest(text): text for text in texts}
        missing = [d for d in known if read_points(self.known.get(d)) is None]
        if missing and self.url:
            print(f"judge: {len(missing)} of {len(texts)} to ask {self.model}", flush=True)
            self.ask_all({d: known[d] for d in missing})
        if self.refused:
            count, first = len(self.refused), self.refused[0]
            print(f"judge: refused {count} texts, which get no points: {first:.300}", flush=True)
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
            except Refused as error:
                self.lost = 0
                self.refused.append(str(error))
                return None
            except FAILURES as error:
                reason = f"judge: {self.url}: {type(error).__name__}: {error!s:.300}"
                if isinstance(error, urllib.error.HTTPError):
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
        """Returns the reply to a text, without `temperature` from when the endpoint refuses it.
        Raises JudgeError, Refused, or one of FAILURES."""
        options = self.options
        try:
            return self.post(text, options)
        except Refused as error:
            if not (options and re.match("HTTP .*temperature", str(error), re.IGNORECASE)):
                raise
        reply = self.post(text, {})
        self.options = {}
        return reply

    def post(self, text: str, options: dict) -> str:
        """Returns the reply to one request. Raises JudgeError, Refused, or one of FAILURES."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}]} | options
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            raise self.meaning(error) from None
        except urllib.error.URLError as error:
            unknown = getattr(error.reason, "errno", None) == socket.EAI_NONAME
            if unknown or isinstance(error.reason, ssl.SSLCertVerificationError):
                raise JudgeError(f"{self.url}: {error.reason}") from None
            raise
        except (ValueError, OverflowError, http.client.InvalidURL) as error:
            raise JudgeError(f"judge_url {self.url!r} is no address: {error}") from None
        return self.read_reply(answer)

    def meaning(self, error: urllib.error.HTTPError) -> Exception:
        """Returns what an HTTP error is: JudgeError, Refused, or itself if it may pass."""
        with suppress(*FAILURES):  # the server's own words, in one line
            words = error.read(10_000).decode(errors="replace").split()
            error.msg = " ".join(words) or error.msg
        if error.code in OF_ONE_TEXT:
            return Refused(str(error))
        may_pass = error.code in (408, 409, 425, 429) or error.code >= 500 and error.code != 501
        if may_pass and "insufficient_quota" not in error.msg:
            return error
        return JudgeError(f"{self.url}: {error!s:.300}")

    def read_reply(self, answer: bytes) -> str:
        """Returns the text of a chat completion. Raises as `post` does."""
        row, begins = None, f"{' '.join(answer.decode(errors='replace').split())!r:.80}"
        with suppress(ValueError, RecursionError):
            row = json.loads(answer)
        is_cut = row is None and answer.lstrip()[:1] in (b"{", b"")
        if not is_cut and not (isinstance(row, dict) and ("choices" in row or "error" in row)):
            raise JudgeError(f"{self.url}: answers with no chat completion: {begins}")
        with suppress(KeyError, IndexError, TypeError, AttributeError):
            choice = row["choices"][0]
            message, ended = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"] == "text")
            if is_text(text) and text.strip():
                return text
            if refusal or text is not None or ended in ("length", "content_filter"):
                raise Refused(f"a reply without text: {refusal or ended}")
        raise http.client.HTTPException(f"no text in choices[0].message.content: {begins}")
