"""Every benchmark runs and says what it is to say. What it measures is not judged here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = {
    "token_path": {
        "tok_s_ratio_vs_bare",
        "tok_s_ratio_vs_http",
        "ttft_added_ms",
        "streams4_ratio_vs_bare",
        "daemon_cpu_ratio_vs_grpc",
    },
    "rpc": {
        "unary_p50_ratio",
        "cancel_decode_ms_p95",
        "cancel_prefill_ms_p95",
        "prefill_batch_ms",
        "halt_ms_p99",
        "clients64_p99_ratio",
        "create_run_ms_p99",
        "slow_reader_rss_mb",
    },
    "robot": {"hold_conflict_us", "heartbeat_lapse_ms", "halt_to_last_call_ms"},
    "scheduler": {
        "floor_violations",
        "urgent_deadline_misses",
        "load_s_ratio_vs_bound",
        "load_s_ratio_vs_best_peer",
        "p99_wait_ratio_vs_best_peer",
        "p99_wait_ratio_worst_class",
        "starved",
        "decision_us_p99",
        "weeks_per_minute",
    },
    "pressure": {
        "unary_ms_p99_under_pressure",
        "unary_ms_p50_under_pressure",
        "unary_failed",
        "runs_lost",
        "loads",
        "evictions",
        "preemptions",
        "kills_survived",
        "floor_crossings",
    },
    "footprint": {"daemon_rss_mb", "ready_s", "idle_cpu_percent", "worker_overhead_mb"},
    "ledger": {
        "durable_ack_ratio",
        "durable_create_ratio",
        "step_overhead_us",
        "step_cpu_us",
        "bytes_per_step",
    },
    "tool_calls": {
        "ranked_vs_schema_accuracy",
        "ranked_full_accuracy",
        "schema_valid",
        "ranked_time_ratio",
    },
    "sessions": {
        "ttft_second_step_ratio",
        "cached_token_share",
        "ttft_second_step_ratio_alternating",
        "cached_token_share_alternating",
    },
    "prefixes": {"cold_ms_0.3k", "warm_ms_0.3k", "first_ms_0.3k", "tool_ms_0.3k", "tokens_0.3k"},
}


def test_every_benchmark_is_listed_here():
    scripts = {path.stem for path in (REPOSITORY / "benchmarks").glob("[!_]*.py")}
    assert scripts == set(KEYS)


@pytest.mark.timeout(300)  # each takes under 25 s on a machine that does nothing else
@pytest.mark.parametrize("name", sorted(KEYS))
def test_last_line_is_json_with_the_named_keys(name: str, engine_store: Path):
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--store", str(engine_store)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == name
    assert last["machine"]
    assert last["engine"]
    measured = {key: last.get(key) for key in KEYS[name]}
    assert all(isinstance(value, float) and math.isfinite(value) for value in measured.values()), (
        measured
    )


def test_without_the_engine_it_says_how_to_get_it(tmp_path: Path):
    command = [sys.executable, "benchmarks/footprint.py", "--quick", "--store", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "make engine" in done.stderr
