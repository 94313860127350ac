"""What every backend must do: one suite, run against each with a real engine.

A backend joins by a line in `BACKENDS`. Prompts are short where they can be: on a CPU a token of
prefill takes 10 ms.
"""

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from edge_agent.backends import create_backend
from edge_agent.backends.base import Backend, Cancelled, Completion, LoadOptions, NextToken
from edge_agent.core import Sampling
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.manifest import Manifest
from edge_agent.errors import LoadFailed, StepFailed
from tests.conftest import ENGINE

SLOTS = 4
OPTIONS = LoadOptions(slots=SLOTS, context_tokens=2048, threads=1, prefill_batch_tokens=64)
LONG_TOKENS = 1500
WAIT_S = 30.0
HALF = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Case:
    """A backend, an engine of it, and what is known about that engine."""

    backend: str
    engine: str
    control_tokens: tuple[str, ...]


BACKENDS = [Case("llama_cpp", ENGINE, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))]


@dataclass
class Loaded:
    """A backend with its engine in memory."""

    case: Case
    backend: Backend
    manifest: Manifest
    directory: Path
    progress: list[float]

    def prompt(self, user: str, begun: str = "") -> list[int]:
        """A user's turn and the beginning of the assistant's, with what it has said already."""
        turns = self.manifest.prompt
        plain = self.backend.tokenize(user, markers=False)
        opening = self.backend.tokenize(turns.user.close + turns.assistant.open, markers=True)
        head = self.backend.tokenize(turns.user.open, markers=True)
        rest = self.backend.tokenize(begun, markers=False) if begun else []
        return head + plain + opening + rest

    def complete(self, prompt: Sequence[int], **changes: Any) -> "Output":
        output = Output()
        arguments: dict[str, Any] = {
            "max_tokens": 16,
            "schema_json": None,
            "lead": "",
            "sampling": Sampling(),
            "stop": self.manifest.stop,
            "cancel": threading.Event(),
            "on_text": output.take,
        }
        output.completion = self.backend.complete(prompt, **(arguments | changes))
        return output

    def next_token(self, prompt: Sequence[int], top: int) -> NextToken:
        return self.backend.next_token_logprobs(prompt, top=top, cancel=threading.Event())


@dataclass
class Output:
    """What a completion told, piece by piece."""

    pieces: list[tuple[str, int]] = field(default_factory=list)
    completion: Completion = field(default_factory=lambda: Completion(False, 0, 0, 0, 0.0))

    def take(self, text: str, tokens: int) -> None:
        self.pieces.append((text, tokens))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.pieces)


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda case: case.backend)
def loaded(request: pytest.FixtureRequest, engine_store: Path) -> Iterator[Loaded]:
    case: Case = request.param
    catalogue = Catalogue(engine_store)
    manifest, directory = catalogue.get(case.engine), catalogue.directory(case.engine)
    backend = create_backend(case.backend)
    progress: list[float] = []
    backend.load(manifest, directory, OPTIONS, progress.append)
    yield Loaded(case, backend, manifest, directory, progress)
    backend.close()


class TestLoading:
    def test_reports_progress_up_to_the_end(self, loaded: Loaded):
        assert loaded.progress == sorted(loaded.progress)
        assert loaded.progress[-1] == 1.0
        assert all(0.0 <= fraction <= 1.0 for fraction in loaded.progress)

    def test_says_its_librarys_version_which_is_no_older_than_the_manifest_asks(
        self, loaded: Loaded
    ):
        found = [int(part) for part in loaded.backend.version().split(".")]
        wanted = [int(part) for part in loaded.manifest.backend.min_version.split(".")]
        assert found >= wanted

    @pytest.mark.parametrize("content", ["first MiB", "noise", "missing"])
    def test_a_file_that_is_no_model_is_named(self, loaded: Loaded, tmp_path: Path, content: str):
        path = tmp_path / loaded.manifest.model
        if content == "first MiB":
            with (loaded.directory / loaded.manifest.model).open("rb") as whole:
                path.write_bytes(whole.read(1 << 20))
        elif content == "noise":
            path.write_bytes(b"no model at all " * 1000)
        with pytest.raises(LoadFailed) as caught:
            create_backend(loaded.case.backend).load(
                loaded.manifest, tmp_path, OPTIONS, lambda _fraction: None
            )
        assert loaded.manifest.model in caught.value.message
        assert caught.value.metadata["engine"] == loaded.manifest.name
        assert not caught.value.retryable

    def test_an_unknown_backend_is_named(self):
        with pytest.raises(LoadFailed, match="'abacus'"):
            create_backend("abacus")


class TestTokenising:
    def test_control_tokens_only_where_markers_are_parsed(self, loaded: Loaded):
        for marker in loaded.case.control_tokens:
            (control,) = loaded.backend.tokenize(marker, markers=True)
            for text in (marker, f"say {marker}", f"{marker}\n", f"a{marker}{marker}b"):
                assert control in loaded.backend.tokenize(text, markers=True)
                assert control not in loaded.backend.tokenize(text, markers=False)

    def test_what_is_no_marker_is_the_same_with_and_without_them(self, loaded: Loaded):
        text = "Fährt der Roboter 🤖 zu Regal 7?\n\t{}"
        plain = loaded.backend.tokenize(text, markers=False)
        assert plain == loaded.backend.tokenize(text, markers=True)
        assert len(plain) > 5

    def test_works_from_many_threads_at_once(self, loaded: Loaded):
        texts = [f"shelf {number}" for number in range(24)]
        alone = [loaded.backend.tokenize(text, markers=False) for text in texts]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda t: loaded.backend.tokenize(t, markers=False), texts))
        assert together == alone

    def test_no_text_is_no_token(self, loaded: Loaded):
        assert loaded.backend.tokenize("", markers=False) == []


class TestCompleting:
    def test_ends_by_itself_without_its_stop_text(self, loaded: Loaded):
        output = loaded.complete(loaded.prompt("What is the capital of France?"), max_tokens=60)
        assert "Paris" in output.text
        assert not output.completion.truncated
        assert not any(stop in output.text for stop in loaded.manifest.stop)

    def test_counts_what_it_read_and_wrote(self, loaded: Loaded):
        prompt = loaded.prompt("Count: one, two, three,")
        output = loaded.complete(prompt, max_tokens=8)
        assert output.completion.truncated
        assert output.completion.completion_tokens == output.tokens == 8
        assert output.completion.prompt_tokens == len(prompt)
        assert output.completion.decode_s > 0

    def test_streams_while_it_decodes(self, loaded: Loaded):
        output = loaded.complete(loaded.prompt("Count to ten."), max_tokens=8)
        assert len(output.pieces) > 4

    def test_one_token_is_enough_to_ask_for(self, loaded: Loaded):
        output = loaded.complete(loaded.prompt("Hello"), max_tokens=1)
        assert output.completion.completion_tokens == 1
        assert output.completion.truncated

    def test_never_splits_a_character(self, loaded: Loaded):
        # Each of these characters is several tokens of a small vocabulary.
        wanted = "🙂ñ日本🤖𝄞"
        output = loaded.complete(
            loaded.prompt("Say it."), max_tokens=60, schema_json=json.dumps({"const": wanted})
        )
        for text, tokens in output.pieces:
            text.encode()  # raises for half a surrogate pair
            assert HALF not in text
            assert tokens >= 1
        assert json.loads(output.text) == wanted
        assert len(output.pieces) < output.tokens
        # Only the token that ends the output has no text.
        assert output.completion.completion_tokens - output.tokens in {0, 1}

    def test_a_stop_text_ends_it_and_is_no_part_of_it(self, loaded: Loaded):
        prompt = loaded.prompt("What is the capital of France?")
        whole = loaded.complete(prompt, max_tokens=24).text
        output = loaded.complete(prompt, max_tokens=24, stop=("Paris",))
        assert output.text == whole.partition("Paris")[0]
        assert not output.completion.truncated

    def test_greedy_is_the_same_each_time_and_a_seed_too(self, loaded: Loaded):
        prompt = loaded.prompt("Tell me a story.")
        for sampling in (Sampling(), Sampling(temperature=1.5, top_p=0.95, seed=7)):
            texts = {loaded.complete(prompt, sampling=sampling).text for _ in range(3)}
            assert len(texts) == 1

    def test_temperature_draws_something_else(self, loaded: Loaded):
        prompt = loaded.prompt("Tell me a story.")
        hot = Sampling(temperature=1.5)
        seeds = [dataclasses.replace(hot, seed=seed) for seed in range(4)]
        assert len({loaded.complete(prompt, sampling=each).text for each in seeds}) > 1

    def test_a_repeated_prompt_is_not_read_again(self, loaded: Loaded):
        prompt = loaded.prompt("Where does the robot go when its battery is low?")
        first = loaded.complete(prompt, max_tokens=2)
        again = loaded.complete(prompt, max_tokens=2)
        assert again.completion.cached_tokens >= len(prompt) - 2
        assert again.completion.prompt_tokens == len(prompt)
        assert again.text == first.text


OBJECT = {
    "type": "object",
    "properties": {
        "place": {"enum": ["dock", "shelf"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["place", "level", "note"],
    "additionalProperties": False,
}


class TestSchemas:
    @pytest.mark.parametrize(
        "schema", [OBJECT, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}]
    )
    def test_output_satisfies_its_schema(self, loaded: Loaded, schema: dict[str, Any]):
        hot = Sampling(temperature=1.5, seed=1)
        output = loaded.complete(
            loaded.prompt("Go on."), max_tokens=80, schema_json=json.dumps(schema), sampling=hot
        )
        assert not output.completion.truncated
        jsonschema_rs.validate(schema, json.loads(output.text))

    def test_a_lead_comes_before_the_json(self, loaded: Loaded):
        prompt = loaded.prompt("Go to the dock.", begun='{"arguments":')
        output = loaded.complete(prompt, max_tokens=80, schema_json=json.dumps(OBJECT), lead=" ")
        assert output.text.startswith(" {")
        jsonschema_rs.validate(OBJECT, json.loads(output.text))

    def test_a_limit_cuts_json_and_says_so(self, loaded: Loaded):
        output = loaded.complete(
            loaded.prompt("Go on."), max_tokens=3, schema_json=json.dumps(OBJECT)
        )
        assert output.completion.truncated
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            json.loads(output.text)

    @pytest.mark.parametrize(
        ("schema", "named"),
        [
            ({"not": {"type": "string"}}, "not"),
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"type": "string", "pattern": "(?=a)b"}, "regex"),
            ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
            ({"type": "strin"}, "strin"),
        ],
    )
    def test_says_what_it_cannot_enforce(self, loaded: Loaded, schema: Any, named: str):
        complaint = loaded.backend.check_schema(json.dumps(schema))
        assert complaint is not None
        assert named in complaint
        assert "\n" not in complaint

    @pytest.mark.parametrize("schema", [OBJECT, {"type": "string"}, {}, True])
    def test_has_nothing_to_say_about_what_it_can(self, loaded: Loaded, schema: Any):
        assert loaded.backend.check_schema(json.dumps(schema)) is None


class TestLogprobs:
    @pytest.mark.parametrize("begun", ["", '{"name": "', "🙂🤖 ñ 日本"])
    def test_are_log_probabilities_and_the_likeliest_is_what_greedy_draws(
        self, loaded: Loaded, begun: str
    ):
        # After the last prompt the likeliest token is only a part of a character.
        prompt = loaded.prompt("Repeat this: 🙂🤖 ñ 日本 🙂🤖", begun)
        found = loaded.next_token(prompt, 50).logprobs
        assert len(found) >= 50
        assert all(logprob <= 0.0 for logprob in found.values())
        assert sum(math.exp(logprob) for logprob in found.values()) <= 1.0 + 1e-3
        likeliest = max(found, key=found.__getitem__)
        # The rest of a character that the prompt has begun is no character of its own.
        longer = loaded.complete([*prompt, likeliest], max_tokens=12).text.lstrip(HALF)
        whole = loaded.complete(prompt, max_tokens=13).text
        assert longer
        assert whole.endswith(longer)

    def test_more_can_be_asked_for_and_none_changes(self, loaded: Loaded):
        prompt = loaded.prompt("Hello")
        few = loaded.next_token(prompt, 5).logprobs
        many = loaded.next_token(prompt, 400).logprobs
        assert len(many) >= 400
        best = sorted(few, key=few.__getitem__)[-3:]
        assert best == sorted(many, key=many.__getitem__)[-3:]
        assert [few[token] for token in best] == pytest.approx(
            [many[token] for token in best], rel=1e-3
        )

    def test_say_how_much_of_the_prompt_was_cached(self, loaded: Loaded):
        prompt = loaded.prompt("A prompt that nothing else in this suite begins like.")
        loaded.next_token(loaded.prompt("Another one, to fill the cache."), 5)
        assert loaded.next_token(prompt, 5).cached_tokens < len(prompt) // 2
        assert loaded.next_token(prompt, 5).cached_tokens >= len(prompt) - 2


class TestLikelihood:
    def likelihood(self, loaded: Loaded, prompt: list[int], text: str) -> float:
        found = loaded.backend.log_likelihood(prompt, text, cancel=threading.Event())
        return found.logprob

    def test_of_one_token_is_that_tokens_log_probability(self, loaded: Loaded):
        prompt = loaded.prompt("Say a word.", '{"name": "')
        likeliest = loaded.complete(prompt, max_tokens=1)
        expected = max(loaded.next_token(prompt, 5).logprobs.values())
        found = self.likelihood(loaded, prompt, likeliest.text)
        assert found == pytest.approx(expected, abs=0.05)

    def test_a_text_that_fits_is_likelier_and_a_longer_one_no_likelier(self, loaded: Loaded):
        prompt = loaded.prompt("What is the capital of France?", "The capital of France is")
        fits, other = (self.likelihood(loaded, prompt, text) for text in (" Paris", " Lima"))
        assert other < fits < 0.0
        assert self.likelihood(loaded, prompt, " Paris and Lima") < fits

    def test_a_text_with_quotes_and_other_scripts_is_gone_through_whole(self, loaded: Loaded):
        text = '{"name": "größe_\\n", "arguments":'
        assert self.likelihood(loaded, loaded.prompt("Hello"), text) < 0.0


class TestCancelling:
    def test_during_decoding(self, loaded: Loaded):
        cancel, told = threading.Event(), []

        def on_text(text: str, _tokens: int) -> None:
            told.append(text)
            if len(told) == 3:
                cancel.set()

        with pytest.raises(Cancelled):
            loaded.complete(
                loaded.prompt("Count to a thousand."),
                max_tokens=1000,
                cancel=cancel,
                on_text=on_text,
            )
        assert len(told) == 3

    def test_beforehand(self, loaded: Loaded):
        cancel = threading.Event()
        cancel.set()
        with pytest.raises(Cancelled):
            loaded.complete(loaded.prompt("Hello"), cancel=cancel)
        with pytest.raises(Cancelled):
            loaded.backend.next_token_logprobs(loaded.prompt("Hello"), top=5, cancel=cancel)
        with pytest.raises(Cancelled):
            loaded.backend.log_likelihood(loaded.prompt("Hello"), "Hi", cancel=cancel)

    @pytest.mark.parametrize("call", ["complete", "next_token_logprobs"])
    def test_during_prefill(self, loaded: Loaded, call: str):
        word = loaded.backend.tokenize(f" {call}", markers=False)
        prompt = (word * LONG_TOKENS)[:LONG_TOKENS]
        cancel, ended = threading.Event(), threading.Event()
        told: list[str] = []

        def work() -> None:
            try:
                if call == "complete":
                    loaded.complete(
                        prompt, cancel=cancel, on_text=lambda text, _tokens: told.append(text)
                    )
                else:
                    loaded.backend.next_token_logprobs(prompt, top=5, cancel=cancel)
            except Cancelled:
                ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        cancel.set()
        thread.join(WAIT_S)
        assert ended.is_set()
        assert told == []
        # The whole prompt was not read: most of it is not in the cache.
        again = loaded.complete(prompt[:200], max_tokens=1)
        assert again.completion.cached_tokens < 200

    def test_the_engine_goes_on_for_others(self, loaded: Loaded):
        cancel = threading.Event()
        prompt = loaded.prompt("What is the capital of France?")
        alone = loaded.complete(prompt, max_tokens=12).text
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(loaded.complete, prompt, max_tokens=12)
            with pytest.raises(Cancelled):
                loaded.complete(
                    loaded.prompt("Count to a thousand."),
                    max_tokens=1000,
                    cancel=cancel,
                    on_text=lambda _text, _tokens: cancel.set(),
                )
        assert other.result().text == alone


class TestTogether:
    def test_several_threads_get_what_each_would_have_got_alone(self, loaded: Loaded):
        """Greedy texts are the same: sequences of a batch do not change each other's logits."""
        questions = ["What is the capital of France?", "Say hello.", "Name a colour.", "1, 2, 3,"]
        prompts = [loaded.prompt(question) for question in questions]
        alone = [loaded.complete(prompt, max_tokens=12).text for prompt in prompts]
        with ThreadPoolExecutor(SLOTS) as pool:
            together = [
                output.text
                for output in pool.map(lambda p: loaded.complete(p, max_tokens=12), prompts)
            ]
        assert together == alone

    def test_more_threads_than_places_wait_for_one(self, loaded: Loaded):
        prompts = [loaded.prompt(f"Say {number}.") for number in range(SLOTS + 3)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            outputs = list(pool.map(lambda p: loaded.complete(p, max_tokens=4), prompts))
        assert [output.completion.prompt_tokens for output in outputs] == [len(p) for p in prompts]

    def test_schemas_of_one_thread_do_not_bind_another(self, loaded: Loaded):
        prompt = loaded.prompt("Say hello.")
        asks: list[Callable[[], Output]] = [
            lambda: loaded.complete(prompt, max_tokens=60, schema_json='{"const": "a"}'),
            lambda: loaded.complete(prompt, max_tokens=6),
            lambda: loaded.complete(prompt, max_tokens=60, schema_json='{"const": 7}'),
        ]
        with ThreadPoolExecutor(3) as pool:
            first, free, third = (each.result() for each in [pool.submit(ask) for ask in asks])
        assert (first.text, third.text) == ('"a"', "7")
        assert free.text not in {'"a"', "7"}


class TestRefusals:
    def test_a_prompt_beyond_the_context_fails_the_step_and_not_the_engine(self, loaded: Loaded):
        word = loaded.backend.tokenize(" word", markers=False)
        with pytest.raises(StepFailed, match="context"):
            loaded.complete(word * (OPTIONS.context_tokens + 1))
        assert loaded.complete(loaded.prompt("Hello"), max_tokens=2).text


def test_what_is_closed_leaves_nothing_on_disk(engine_store: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    catalogue = Catalogue(engine_store)
    for case in BACKENDS:
        backend = create_backend(case.backend)
        backend.load(
            catalogue.get(case.engine),
            catalogue.directory(case.engine),
            dataclasses.replace(OPTIONS, slots=1),
            lambda _fraction: None,
        )
        backend.close()
    assert list(tmp_path.iterdir()) == []
