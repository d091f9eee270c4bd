"""A judge that is slow, talks nonsense, fails or hangs up: counts stay right, and what was judged
is never asked again. A local server plays the judge."""

import json
import threading
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import eval as evaluation
from eval import rescore
from tasks import judge as judging
from tasks.judge import Judge, JudgeError


class Server(ThreadingHTTPServer):
    """Answers a request by what `behaviour` says of the candidate in it: a list of what to do at
    each try, the last again and again. Counts the tries of each candidate."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour: dict[str, list] = {}
        self.tries: Counter = Counter()
        self.keys: set = set()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):  # a client that hangs up is part of the test
        pass

    def urlopen(self, request, timeout):
        """Stands for urllib's. The client waits for a slow answer for a moment, and for any other
        one as long as it takes, so that a busy machine makes no difference."""
        assert timeout == judging.SECONDS
        candidate = candidate_of(request.data)
        with self.lock:
            steps = self.behaviour[candidate]
            number = min(self.tries[candidate], len(steps) - 1)
            self.tries[candidate] += 1
        request.add_header("Step", str(number))
        return URLOPEN(request, timeout=0.1 if steps[number] == "slow" else 60)


URLOPEN = urllib.request.urlopen


def candidate_of(body: bytes) -> str:
    text = json.loads(body)["messages"][0]["content"]
    return text.split("Candidate:\n")[1].split("\n")[0]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        body, step = json.loads(content), int(self.headers["Step"])
        with self.server.lock:
            self.server.keys.add(self.headers["Authorization"])
        assert self.path == "/v1/chat/completions" and body["model"] == "judge-1"
        step = self.server.behaviour[candidate_of(content)][step]
        if step == "slow":
            self.server.ended.wait(60)
        elif step == "cut":
            self.connection.close()
        elif isinstance(step, int):
            self.send_response(step)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            reply = step if isinstance(step, bytes) else completion(step)
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    def log_message(self, *_):
        pass


def completion(content) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judging, "PAUSES", (0.01, 0.02))
    with Server() as server:
        monkeypatch.setattr(urllib.request, "urlopen", server.urlopen)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def completions_file(path, candidates) -> None:
    rows = [
        {"example": {"prompt": "p", "raw_prediction": c, "raw_answers": ["r"]}, "score": None}
        for c in candidates
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_failures_are_retried_counted_and_asked_again(server, tmp_path):
    server.behaviour = {
        "good": ["Total score: 8"],
        "busy": [429, 500, "Total score: 6.5 points"],
        "cut once": ["cut", "Total score: 10"],
        "slow once": ["slow", "总分是：4分"],
        "broken once": [b"{", completion(None), "Total score: 2"],
        "talker": ["I like it", "Total score: 12", "Total score: 0"],
        "always down": [503],
        "always slow": ["slow"],
    }
    path = tmp_path / "summary.jsonl"
    completions_file(path, server.behaviour)

    def run():
        judge = Judge(server.url, "judge-1", "secret", tmp_path / "judge.jsonl")
        result, _ = rescore(path, "summary", judge)
        return result

    result = run()
    scores = [r["score"] for r in result.records]
    assert scores == [0.8, 0.65, 1.0, 0.4, 0.2, None, None, None]
    assert (result.count, result.missing) == (5, 3)
    assert result.mean == pytest.approx((0.8 + 0.65 + 1.0 + 0.4 + 0.2) / 5)  # missing is not 0
    tries = {"good": 1, "busy": 3, "cut once": 2, "slow once": 2, "broken once": 3}
    tries |= {"talker": 1, "always down": 3, "always slow": 3}
    assert server.tries == tries and server.keys == {"Bearer secret"}

    server.tries.clear()
    server.behaviour["always down"] = ["Total score: 5"]
    server.behaviour["talker"] = ["Total score: 12"]
    server.behaviour["always slow"] = ["Total score: 1"]
    result = run()
    assert [r["score"] for r in result.records] == [0.8, 0.65, 1.0, 0.4, 0.2, None, 0.5, 0.1]
    assert server.tries == {"talker": 1, "always down": 1, "always slow": 1}
    kept = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().split("\n") if line]
    assert [r["reply"] for r in kept].count("I like it") == 1  # unreadable ones are kept, too
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_a_judge_that_answers_in_between_is_not_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PAUSES", ())
    server.behaviour = {"down": [503], "good": ["Total score: 8"]}
    judge, stop = Judge(server.url, "judge-1", "", tmp_path / "judge.jsonl"), threading.Event()
    for _ in range(judging.REQUESTS):
        assert judge.ask("Candidate:\ndown\n", stop) is None
        assert judge.ask("Candidate:\ngood\n", stop) == "Total score: 8"


def test_pauses_are_kept_where_the_judge_asks_for_less(server, tmp_path):
    waited = []

    class Stop(threading.Event):
        def wait(self, seconds):
            waited.append(seconds)

    server.behaviour = {"down": [503]}  # with Retry-After: 0
    judge = Judge(server.url, "judge-1", "", tmp_path / "judge.jsonl")
    assert judge.ask("Candidate:\ndown\n", Stop()) is None
    assert waited == list(judging.PAUSES)


def test_equal_completions_are_asked_once_and_another_model_anew(server, tmp_path):
    server.behaviour = {"same": ["Total score: 3"]}
    judge = Judge(server.url, "judge-1", "", tmp_path / "judge.jsonl")
    text = "Candidate:\nsame\n"
    assert judge.points([text, text]) == [0.3, 0.3]
    assert server.tries == {"same": 1} and server.keys == {None}
    other = Judge(server.url, "judge-2", "", tmp_path / "judge.jsonl")
    assert other.digest(text) not in other.known and judge.digest(text) in other.known


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_retry_mends_ends_the_run_and_loses_nothing(server, tmp_path, status, monkeypatch):
    monkeypatch.setattr(judging, "REQUESTS", 1)
    server.behaviour = {"good": ["Total score: 8"], "refused": [status]}
    judge = Judge(server.url, "judge-1", "", tmp_path / "judge.jsonl")
    with pytest.raises(JudgeError, match=f"{server.url}: HTTP Error {status}"):
        judge.points([f"Candidate:\n{c}\n" for c in ("good", "refused")])
    assert server.tries == {"good": 1, "refused": 1}
    again = Judge(server.url, "judge-1", "", tmp_path / "judge.jsonl")
    assert again.points(["Candidate:\ngood\n"]) == [0.8] and server.tries["good"] == 1


def test_a_text_that_is_refused_is_missing_and_others_are_judged(server, tmp_path):
    server.behaviour = {"good": ["Total score: 8"], "too long": [400]}
    judge = Judge(server.url, "judge-1", "", tmp_path / "judge.jsonl")
    assert judge.points([f"Candidate:\n{c}\n" for c in ("too long", "good")]) == [None, 0.8]
    assert server.tries == {"good": 1, "too long": 1}


def test_a_judge_that_is_not_there_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PAUSES", (0.001,))
    tries = []

    def nobody(self, text):
        tries.append(text)
        raise ConnectionRefusedError

    monkeypatch.setattr(Judge, "request", nobody)
    judge = Judge("http://127.0.0.1:9/v1", "judge-1", "", tmp_path / "judge.jsonl")
    assert judge.points([f"{n}" for n in range(100)]) == [None] * 100
    assert len(tries) <= 2 * 2 * judging.REQUESTS
    monkeypatch.setattr(Judge, "request", lambda self, text: "Total score: 5")
    assert judge.points(["0", "1"]) == [0.5, 0.5]  # back for the next evaluation


def test_points_are_kept_where_no_judge_is_asked(server, tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(Judge, "request", lambda self, text: "Total score: 5")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "p", "raw_answers": ["r"]}))
    command = ["eval.py", "--model", str(checkpoint), "--task", "law", "--data", str(data)]
    command += ["--output", str(out), "--max_new_tokens", "2", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--judge_url", server.url, "--judge_model", "m"])
    evaluation.main()
    first = (out / "results.json").read_text()
    assert json.loads(first)["base.law.jsonl"]["metrics"]["points"] == 0.5
    monkeypatch.setattr(Judge, "request", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.argv", command)
    evaluation.main()
    assert (out / "results.json").read_text() == first
    rows = str(out / "base.law.jsonl")
    monkeypatch.setattr(Judge, "check", lambda _: None)
    judged = ["--rescore", rows, "--task", "law", "--judge_url", server.url, "--judge_model", "m"]
    monkeypatch.setattr("sys.argv", ["eval.py", *judged])
    evaluation.main()


@pytest.mark.parametrize("reply", ["一二三", "a\u2028b\u0085c Total score: 4"])
def test_any_reply_is_kept(reply, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "request", lambda self, text: f"{reply} Total score: 4")
    file = tmp_path / "judge.jsonl"
    Judge("http://h", "m", "", file).points(["x"])
    monkeypatch.setattr(Judge, "request", lambda *_: pytest.fail("asked again"))
    assert Judge("http://h", "m", "", file).points(["x"]) == [0.4]


@pytest.mark.parametrize("key", ["sk-1\nHost: x", "clé"])
def test_a_key_that_is_none_is_refused_and_not_shown(key, tmp_path):
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as raised:
        Judge("http://h", "m", key, tmp_path / "judge.jsonl")
    assert "sk-1" not in str(raised.value)
    assert Judge("http://h", "m", " sk-1\n", tmp_path / "judge.jsonl").key == "sk-1"


def test_a_reply_cut_off_by_a_kill_is_asked_again(server, tmp_path):
    server.behaviour = {"a": ["Total score: 1"], "b": ["Total score: 2"]}
    texts = [f"Candidate:\n{c}\n" for c in "ab"]
    file = tmp_path / "judge.jsonl"
    Judge(server.url, "judge-1", "", file).points(texts[:1])
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert Judge(server.url, "judge-1", "", file).points(texts) == [0.1, 0.2]
    assert Judge(server.url, "judge-1", "", file).points(texts) == [0.1, 0.2]
    assert server.tries == {"a": 2, "b": 1}


def test_nobody_there_is_missing_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PAUSES", (0.01,))
    judge = Judge("http://127.0.0.1:9/v1", "judge-1", "", tmp_path / "judge.jsonl")
    assert judge.points(["Candidate:\na\n"]) == [None]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://h/v1"])
def test_an_address_that_is_none_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match="judge_url is .*; must begin with http:// or https://"):
        Judge(url, "judge-1", "", tmp_path / "judge.jsonl")
