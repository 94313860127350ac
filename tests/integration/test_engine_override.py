"""What the configuration wants otherwise than an engine's manifest: a smaller context."""

import signal

import grpc
import pytest

from edge_agent.config import parse_config
from edge_agent.engines.manifest import MANIFEST_NAME, decode_manifest
from edge_agent.errors import LoadFailed
from edge_agent.settings import context_problem, scheduler_settings
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.connection import Connection, Problem, events, goal
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon


@pytest.fixture(scope="module")
def manifest(engine_store):
    return decode_manifest((engine_store / ENGINE / MANIFEST_NAME).read_bytes())


def wanting(context_tokens):
    return f"{BASE_CONFIG}engines: {{{ENGINE}: {{context_tokens: {context_tokens}}}}}\n"


def engine_of(client):
    request = engine_pb.GetEngineRequest(name=ENGINE)
    return client.engines.GetEngine(request, timeout=20).engine


def loading(config):
    return scheduler_settings(config, None, 8 << 30).loading


def ended(client, words, **options):
    return list(events(client.execute(goal("word " * words, **options))))[-1].run_finished.run


def test_the_context_can_be_lowered_down_to_the_manifests_and_no_further_up(manifest):
    limit = manifest.context_tokens
    for wanted in (256, limit - 1, limit):
        config = parse_config(wanting(wanted), "test")
        assert context_problem(config, manifest) is None
        assert loading(config).options(manifest).context_tokens == wanted

    config = parse_config(wanting(limit + 1), "test")
    problem = context_problem(config, manifest)
    assert problem is not None
    assert problem.field == f"engines.{ENGINE}.context_tokens"
    assert problem.description.startswith(f"{limit + 1}, must be at most {limit}")
    with pytest.raises(LoadFailed) as refused:
        loading(config).options(manifest)
    assert refused.value.reason == "CONTEXT_TOO_LONG"


def test_without_a_word_about_it_the_context_is_the_manifests(manifest):
    config = parse_config(f"engines: {{{ENGINE}: {{slots: 2}}}}", "test")
    assert loading(config).options(manifest).context_tokens == manifest.context_tokens


def test_a_lower_context_refuses_a_prompt_that_the_manifest_would_take(engine_store, manifest):
    with (
        running_daemon(engine_store, wanting(512)) as daemon,
        Connection(daemon.api_socket) as client,
    ):
        run = ended(client, 600)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "PROMPT_TOO_LONG")
        assert run.error.metadata["context_tokens"] == "512"
        assert engine_of(client).context_tokens == 512  # as it was loaded

        run = ended(client, 450, max_output_tokens=8)
        assert run.state == run_pb.RUN_STATE_SUCCEEDED
        assert run.usage.prompt_tokens > 450


def test_a_higher_context_is_degraded_and_fails_the_load_until_it_is_mended(engine_store, manifest):
    too_long = manifest.context_tokens + 1
    with (
        running_daemon(engine_store, wanting(too_long)) as daemon,
        Connection(daemon.api_socket) as client,
    ):
        status = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
        assert status.state == system_pb.DAEMON_STATE_DEGRADED
        (reason,) = status.degraded_reasons
        assert reason.startswith(f"engines.{ENGINE}.context_tokens: {too_long}, must be at most")

        run = ended(client, 1)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "CONTEXT_TOO_LONG")
        assert run.error.metadata["engine"] == ENGINE
        assert not run.error.retryable
        assert engine_of(client).state == engine_pb.ENGINE_STATE_FAILED
        with Connection(daemon.admin_socket) as admin, pytest.raises(grpc.RpcError) as refused:
            admin.engines.LoadEngine(engine_pb.LoadEngineRequest(name=ENGINE), timeout=20)
        assert Problem(refused.value).reason == "CONTEXT_TOO_LONG"

        daemon.configure(wanting(1024))
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("config_reloaded")
        assert ended(client, 1, max_output_tokens=4).state == run_pb.RUN_STATE_SUCCEEDED
        assert engine_of(client).context_tokens == 1024
