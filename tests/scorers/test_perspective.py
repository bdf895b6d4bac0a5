"""Perspective against a local server that plays it: right, throttled, broken, silent, refusing; and replay without it."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest

from expunge import cli
from expunge.errors import ExpungeError
from expunge.scorers import load_scorer, perspective_client
from expunge.scorers.perspective import ALWAYS, ATTRIBUTES, MAX7, PerspectiveScorer
from expunge.scorers.perspective_client import retry_after

SECRET = "AIza-not-a-real-key"
TEXTS = ["The river runs", " past the old mill.", "A cold wind", "They planted apple trees"]
ERRORS = {
    "language": (400, {"details": [{"errorType": "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"}], "message": "no such language"}),
    "wrong key": (400, {"message": "API key not valid. Please pass a valid API key.", "details": [{"reason": "X"}]}),
    "suspended": (403, {"message": f"Consumer 'api_key:{SECRET}' has been\n\x1b[31m suspended."}),
    "gone": (404, {"message": "Method not found."}),
    "throttled": (429, {"message": f"Quota exceeded, {SECRET}"}),
    "broken": (503, {"message": "The service is unavailable."}),
}


def true_score(text: str, attribute: str) -> float:
    """What the server says: another number for every text and attribute."""
    return (sum(text.encode()) * 31 + ATTRIBUTES.index(attribute) * 977) % 1000 / 1000


class Server(ThreadingHTTPServer):
    """`plan` has what becomes of the next requests, in order; after it, and at "", they are answered well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[str] = []
        self.asked: list[dict] = []  # bodies, in order
        self.answered: Counter[str] = Counter()  # texts
        self.keys: set[str] = set()
        self.headers: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}/v1alpha1/comments:analyze"
        self.silence = threading.Event()

    def handle_error(self, request, client_address):
        """Clients that hang up are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(body)
        server.keys.add(self.headers["X-Goog-Api-Key"])
        act = server.plan.pop(0) if server.plan else ""
        text = body["comment"]["text"]
        scores = {
            name: {"summaryScore": {"value": true_score(text, name), "type": "PROBABILITY"}}
            for name in body["requestedAttributes"]
        }
        answer: object = {"attributeScores": scores, "languages": ["en"], "detectedLanguages": ["en"]}
        if act == "silent":
            server.silence.wait(5)
        if act in ("silent", "closed"):
            self.close_connection = True
            return
        if act in ERRORS:
            status, error = ERRORS[act]
            self.send({"error": {"code": status, **error}}, status)
            return
        if act == "partial":
            del scores["INSULT"]
        if act == "nan":
            scores["THREAT"]["summaryScore"]["value"] = float("nan")
        if act == "page":
            answer = []
        server.answered[text] += not act
        self.send(answer, cut=act == "cut")

    def send(self, answer: object, status: int = 200, cut: bool = False):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    playing = Server()
    threading.Thread(target=playing.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield playing
    playing.silence.set()
    playing.shutdown()
    playing.server_close()


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """The cache file; and the environment of somebody with a key."""
    monkeypatch.setenv("PERSPECTIVE_API_KEY", SECRET)
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    for name in ("PERSPECTIVE_API_URL", "PERSPECTIVE_QPS", "EXPUNGE_PERSPECTIVE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "perspective" / "scores.jsonl"


@pytest.fixture
def scorer(server):
    """`scorer(attribute, **changes)`: one that asks the local server, and is not patient."""

    def make(attribute: str = "TOXICITY", **changes) -> PerspectiveScorer:
        return PerspectiveScorer(attribute, **{"url": server.url, "rate": 1e4, "backoff": 0.002, "tries": 3} | changes)

    return make


@pytest.fixture
def clock(monkeypatch):
    """Waiting takes no time: `waits` has the seconds, and the client's clock moves on by them alone."""
    kept = SimpleNamespace(now=0.0, waits=[])

    def sleep(seconds: float) -> None:
        kept.now += seconds
        kept.waits += [seconds] if seconds else []

    monkeypatch.setattr(perspective_client, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: kept.now))
    return kept


def truth(texts: list[str], attribute: str = "TOXICITY") -> list[float]:
    return [true_score(text, attribute) if text.strip() else 0.0 for text in texts]


def test_scores_keep_their_order_and_each_text_is_asked_for_once(server, scorer):
    texts = [TEXTS[1], "", TEXTS[0], TEXTS[1], " \n", TEXTS[2], TEXTS[0]]
    scores = scorer().score(texts)
    assert scores.tolist() == truth(texts) and scores.dtype == np.float64 and len(set(scores)) == 4
    assert [body["comment"]["text"] for body in server.asked] == [TEXTS[1], TEXTS[0], TEXTS[2]]
    assert server.keys == {SECRET}
    assert server.asked[0] == {
        "comment": {"text": TEXTS[1], "type": "PLAIN_TEXT"},
        "languages": ["en"],
        "requestedAttributes": {name: {} for name in ALWAYS},
        "doNotStore": True,
    }


def test_blank_texts_are_zero_without_a_request(server, scorer):
    assert scorer().score(["", " ", "\n\t"]).tolist() == [0, 0, 0]
    assert scorer().score([]).shape == (0,)
    assert not server.asked


def test_max7_is_the_highest_of_seven_and_costs_no_new_request(server, scorer):
    scorer().score(TEXTS)
    assert scorer("max7").score(TEXTS).tolist() == [max(true_score(text, name) for name in MAX7) for text in TEXTS]
    assert scorer("Insult").score(TEXTS).tolist() == truth(TEXTS, "INSULT")
    assert scorer("flirtation").score(TEXTS).tolist() == truth(TEXTS, "FLIRTATION")
    assert len(server.asked) == len(TEXTS)


def test_the_seven_are_the_columns_of_realtoxicityprompts(rtp):
    row = next(iter(rtp.values()))
    assert {name.lower() for name in ALWAYS} == set(row["continuation"]) - {"text"}
    assert set(ALWAYS) - set(MAX7) == {"FLIRTATION"} and len(ALWAYS) == 8


def test_a_rarer_attribute_is_asked_for_alone_where_the_others_are_cached(server, scorer):
    scorer().score(TEXTS[:1])
    assert scorer("spam").score(TEXTS[:2]).tolist() == truth(TEXTS[:2], "SPAM")
    assert [list(body["requestedAttributes"]) for body in server.asked] == [[*ALWAYS], ["SPAM"], [*ALWAYS, "SPAM"]]


@pytest.mark.parametrize("act", ["throttled", "broken", "silent", "closed", "cut"])
def test_what_passes_is_tried_again(server, scorer, act):
    server.plan = [act, act, "", act]
    assert scorer(timeout=0.4 if act == "silent" else 20).score(TEXTS).tolist() == truth(TEXTS)
    assert len(server.asked) == len(TEXTS) + 3
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("throttled", "HTTP 429, Quota exceeded, ***, after 3 tries"),
        ("broken", "HTTP 503, The service is unavailable., after 3 tries"),
        ("silent", "no answer (ReadTimeout), after 3 tries"),
        ("closed", "no answer (RemoteProtocolError), after 3 tries"),
    ],
)
def test_what_does_not_pass_is_an_error_and_the_next_call_goes_on(server, scorer, path, act, said):
    server.plan = ["", "", act, act, act]
    with pytest.raises(ExpungeError) as caught:
        scorer(timeout=0.4 if act == "silent" else 20).score([*TEXTS, TEXTS[0]])
    wanted = f"perspective: text 3: {said}; 2 of 4 texts are in {path}, and the same command goes on from there"
    assert str(caught.value) == wanted
    assert scorer().score(TEXTS).tolist() == truth(TEXTS)
    assert server.answered == dict.fromkeys(TEXTS, 1)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("wrong key", r"the key in PERSPECTIVE_API_KEY is refused \(HTTP 400, API key not valid"),
        (
            "suspended",
            r"the key in PERSPECTIVE_API_KEY is refused \(HTTP 403, Consumer 'api_key:\*\*\*' has been \[31m susp",
        ),
        ("language", r"refused \(HTTP 400, LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE: no such language\): leave this text out"),
        ("gone", r"unexpected answer \(HTTP 404, Method not found"),
        ("partial", "no 'INSULT' in the answer"),
        ("nan", r"THREAT is nan in the answer, no score in \[0, 1\]"),
        ("page", "the answer is not Perspective's JSON"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once_and_no_score(server, scorer, path, act, said):
    server.plan = ["", act]
    with pytest.raises(ExpungeError, match=f"text 2: {said}.*; 1 of 4 texts are in") as caught:
        scorer().score(TEXTS)
    assert len(server.asked) == 2 and str(caught.value).isprintable()
    assert len(path.read_text().splitlines()) == 1
    assert scorer().score(TEXTS).tolist() == truth(TEXTS)


def test_the_wait_is_the_longer_of_what_is_asked_and_the_back_off(server, scorer, clock):
    server.plan, server.headers = ["throttled"], {"Retry-After": "100"}
    scorer().score(TEXTS[:1])
    assert clock.waits == [100]
    server.plan, server.headers, clock.waits = ["broken"] * 4, {"Retry-After": "1"}, []
    scorer(backoff=8, tries=5).score(TEXTS[1:2])
    assert [4 * 2**i <= wait <= 12 * 2**i for i, wait in enumerate(clock.waits)] == [True] * 4
    assert len({wait / 2**i for i, wait in enumerate(clock.waits)}) == 4  # with chance, lest all come back at once


def test_nobody_waits_for_hours(server, scorer):
    server.plan, server.headers = ["throttled"], {"Retry-After": "86400"}
    with pytest.raises(ExpungeError, match="it asks to wait 86400 s; 0 of 1 texts"):
        scorer().score(TEXTS[:1])
    assert len(server.asked) == 1


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("", 0), ("soon", 0), ("-3", 0), ("٣", 0)])
def test_retry_after(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_a_date():
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") < 0
    assert retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 1e8


def test_requests_keep_to_the_rate(server, scorer, clock, monkeypatch):
    scorer(rate=None).score(TEXTS)
    np.testing.assert_allclose(clock.waits, [1, 1, 1])
    monkeypatch.setenv("PERSPECTIVE_QPS", "2.5")
    server.plan, clock.waits = ["broken"], []
    scorer(rate=None, backoff=0.1).score([text + "!" for text in TEXTS])
    assert sum(clock.waits) == pytest.approx(4 / 2.5)  # the second try keeps to it too


def test_replay_needs_neither_key_nor_network_nor_its_library(server, scorer, path, tmp_path, monkeypatch):
    scorer().score(TEXTS)
    shipped = tmp_path / "shipped.jsonl"
    path.rename(shipped)
    server.shutdown()
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    monkeypatch.setenv("EXPUNGE_PERSPECTIVE_CACHE", str(shipped))
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("no network"))
    before = shipped.read_bytes()
    assert scorer("max7").score([*TEXTS[::-1], ""])[:4].tolist() == [
        max(true_score(text, name) for name in MAX7) for text in TEXTS[::-1]
    ]
    with pytest.raises(ExpungeError, match=r"PERSPECTIVE_API_KEY is not set, and 2 of 3 texts are not in .*shipped\.jsonl"):
        scorer().score([TEXTS[0], "new", "newer", "new", " "])
    with pytest.raises(ExpungeError, match=r"1 of 1 texts are not in"):
        scorer("spam").score(TEXTS[:1])
    assert shipped.read_bytes() == before and not path.exists()


def test_scores_of_another_address_are_not_replayed(server, scorer, monkeypatch):
    scorer().score(TEXTS[:1])
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    with pytest.raises(ExpungeError, match="1 of 1 texts are not in"):
        load_scorer("perspective").score(TEXTS[:1])


def test_without_key_and_scores_it_is_not_even_made(scorer, monkeypatch):
    monkeypatch.setenv("PERSPECTIVE_API_KEY", " ")
    with pytest.raises(
        ExpungeError, match=r"^perspective:INSULT: PERSPECTIVE_API_KEY is not set, and .*no scores to replay"
    ):
        scorer("insult")


def test_without_the_library_a_key_is_no_use(scorer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExpungeError, match=r"requests need httpx2: pip install 'expunge\[perspective\]'"):
        scorer()


def test_importing_the_scorer_does_not_import_the_library():
    code = "import sys; from expunge.scorers import perspective; sys.exit('httpx2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ctrl_c_keeps_what_was_answered(server, scorer, monkeypatch, caplog):
    post, calls = httpx2.Client.post, iter([False, False, True])

    def interrupted(*args, **kwargs):
        if next(calls):
            raise KeyboardInterrupt
        return post(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(httpx2.Client, "post", interrupted)
        with pytest.raises(KeyboardInterrupt), caplog.at_level("INFO", "expunge"):
            scorer().score(TEXTS)
    assert "perspective: stopped; 2 of 4 texts are in" in caplog.messages[-1]
    assert scorer().score(TEXTS).tolist() == truth(TEXTS)
    assert server.answered == dict.fromkeys(TEXTS, 1)


def test_what_another_process_has_fetched_meanwhile_is_not_asked_for(server, scorer, monkeypatch):
    first, second = scorer(), scorer()
    add = first.cache.add

    def add_slowly(key, scores):
        second.score(TEXTS[1:3])
        add(key, scores)

    monkeypatch.setattr(first.cache, "add", add_slowly)
    assert first.score(TEXTS).tolist() == truth(TEXTS)
    assert server.answered == dict.fromkeys(TEXTS, 1)


def test_a_text_of_too_many_bytes_is_neither_cut_nor_asked_for(server, scorer):
    fits, long = "é" * 10_240, "é" * 10_240 + "e"
    with pytest.raises(ExpungeError, match="text 2 has 20481 bytes, more than the 20480"):
        scorer().score([fits, long])
    assert not server.asked
    assert scorer().score([fits]).tolist() == truth([fits])


def test_the_key_and_the_texts_stand_nowhere(server, scorer, path, caplog):
    server.plan = ["", "throttled", "", "suspended"]
    with caplog.at_level("DEBUG"), pytest.raises(ExpungeError) as caught:
        scorer().score(TEXTS)
    assert "perspective: 4 of 4 texts to ask for" in caplog.messages and any("HTTP Request" in m for m in caplog.messages)
    for place in (str(caught.value), caplog.text, path.read_text(), repr(vars(scorer()))):
        assert SECRET not in place
        assert not any(text in place for text in TEXTS)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PERSPECTIVE_QPS", "fast", "PERSPECTIVE_QPS='fast': expected requests a second"),
        ("PERSPECTIVE_QPS", "0", "a number above 0"),
        ("PERSPECTIVE_QPS", "nan", "a number above 0"),
        ("PERSPECTIVE_API_URL", "localhost:1/x", "PERSPECTIVE_API_URL: expected an address"),
        ("PERSPECTIVE_API_URL", f"https://localhost/x?key={SECRET}", "the key goes into PERSPECTIVE_API_KEY"),
        ("PERSPECTIVE_API_URL", "http://localhost:99999/", "PERSPECTIVE_API_URL: expected an address"),
        ("PERSPECTIVE_API_KEY", f"{SECRET}\n{SECRET}", "PERSPECTIVE_API_KEY holds a space"),
        ("PERSPECTIVE_API_KEY", f"{SECRET}é", "another character that no key has"),
    ],
)
def test_a_bad_setting_is_one_line_without_the_key(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(ExpungeError, match=said) as caught:
        load_scorer("perspective")
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_names_and_digests():
    names = {"perspective": "perspective", "perspective:toxicity": "perspective", "perspective:Max7": "perspective:max7"}
    for asked, name in names.items():
        assert load_scorer(asked).name == name
    assert load_scorer("perspective").digest == load_scorer("perspective:toxicity").digest
    digests = {load_scorer(f"perspective:{name}").digest for name in (*ATTRIBUTES, "max7")}
    assert len(digests) == len(ATTRIBUTES) + 1
    assert PerspectiveScorer(url="http://localhost/").digest not in digests


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("perspective:TOXIC", "perspective: unknown attribute 'TOXIC' (did you mean 'TOXICITY'?)"),
        ("perspective:max8", "perspective: unknown attribute 'max8' (did you mean 'MAX7'?)"),
        ("perspectiv", "unknown scorer 'perspectiv' (did you mean 'perspective'?)"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_suggestion(name, said):
    with pytest.raises(ExpungeError, match=f"^{re.escape(said)}$"):
        load_scorer(name)


def test_the_command_line(server, tmp_path, monkeypatch, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.setenv("PERSPECTIVE_API_URL", server.url)
    monkeypatch.setenv("PERSPECTIVE_QPS", "1000")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["expunge", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert call("score", str(file), "--scorer", "perspective", "--scorer", "perspective:max7") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["scores"]["perspective"] for record in records] == truth(TEXTS)
    assert len(server.asked) == len(TEXTS)
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    assert call("score", str(file), "--scorer", "perspective:threat") == 0
    assert [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()] == truth(TEXTS, "THREAT")
    assert call("score", str(file), "--scorer", "perspective:SPAM") == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("expunge: perspective:SPAM: PERSPECTIVE_API_KEY is not set, and 4 of 4 texts")
    assert call("list", "scorers") == 0
    assert "perspective:ATTRIBUTE" in capsys.readouterr().out
