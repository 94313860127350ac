"""From the configuration to the settings of each part."""

from collections.abc import Callable, Mapping

from edge_agent.api.ports import RequestLimits
from edge_agent.config import Config
from edge_agent.config_sections import AllowedTool, EngineOverride, Scheduling, ToolServer
from edge_agent.core import SideEffect, Tool
from edge_agent.engines.host import WorkerSettings
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import FieldViolation, LoadFailed
from edge_agent.ledger.settings import LedgerSettings
from edge_agent.runs.settings import RunSettings
from edge_agent.scheduling import reserve
from edge_agent.scheduling.loading import LoadingSettings
from edge_agent.scheduling.scheduler import SchedulerSettings
from edge_agent.scheduling.values import Rules
from edge_agent.tools import settings as tools


def scheduler_settings(
    config: Config, module_part: str | None, total_bytes: int
) -> SchedulerSettings:
    """What the configuration says about engines and their workers.

    What it leaves open follows from the module and its memory (`scheduling.reserve`).
    """
    worker = config.worker

    def worker_settings(manifest: Manifest) -> WorkerSettings:
        python = worker.python.get(manifest.backend.name)
        return WorkerSettings(
            python=str(python) if python else None,
            heartbeat_interval_s=worker.heartbeat_interval_s,
            heartbeat_timeout_s=worker.heartbeat_timeout_s,
            oom_score_adj=worker.oom_score_adj,
        )

    def options(manifest: Manifest) -> Options:
        override = config.engines.get(manifest.name, EngineOverride())
        if problem := context_problem(config, manifest):
            raise LoadFailed(
                f"{problem.field}: {problem.description}",
                reason="CONTEXT_TOO_LONG",
                metadata={"engine": manifest.name, "context_tokens": manifest.context_tokens},
            )
        return Options(
            slots=override.slots or manifest.slots,
            context_tokens=override.context_tokens or manifest.context_tokens,
            threads=override.threads or worker.threads,
            prefill_batch_tokens=worker.prefill_batch_tokens,
            backlog_tokens=worker.backlog_tokens,
            backlog_s=worker.backlog_age_s,
        )

    scheduling = config.scheduling
    return SchedulerSettings(
        rules=_rules(scheduling, module_part, total_bytes),
        loading=LoadingSettings(
            load_timeout_s=scheduling.load_timeout_s,
            unload_timeout_s=scheduling.unload_timeout_s,
            memory_back_s=scheduling.memory_back_s,
            worker=worker_settings,
            options=options,
        ),
        pinned=frozenset(name for name, engine in config.engines.items() if engine.pinned),
    )


def _rules(scheduling: Scheduling, module_part: str | None, total_bytes: int) -> Rules:
    def given(value: int | None, default: int) -> int:
        return default if value is None else value

    soft = given(scheduling.soft_floor_bytes, reserve.soft_floor_bytes(total_bytes))
    hard = given(scheduling.hard_floor_bytes, reserve.hard_floor_bytes(total_bytes))
    return Rules(
        reserve_bytes=given(
            scheduling.robot_reserve_bytes, reserve.robot_reserve_bytes(module_part, total_bytes)
        ),
        soft_floor_bytes=soft,
        hard_floor_bytes=min(hard, soft),
        budget_bytes=scheduling.memory_budget_bytes,
        max_resident_engines=scheduling.max_resident_engines,
        max_waiting_steps=scheduling.max_waiting_steps,
        min_residency_s=scheduling.min_residency_s,
        client_weights=dict(scheduling.client_weights),
    )


def context_problem(config: Config, manifest: Manifest) -> FieldViolation | None:
    """What is wrong with the context that the configuration wants of an engine; None if nothing."""
    wanted = config.engines.get(manifest.name, EngineOverride()).context_tokens
    if wanted is None or wanted <= manifest.context_tokens:
        return None
    return FieldViolation(
        f"engines.{manifest.name}.context_tokens",
        f"{wanted}, must be at most {manifest.context_tokens}, as in the engine's manifest",
    )


def ledger_settings(config: Config) -> LedgerSettings:
    """What the configuration says about the ledger."""
    ledger = config.ledger
    return LedgerSettings(
        max_bytes=ledger.max_size_bytes,
        retention_s=ledger.retention_s,
        ballast_bytes=ledger.ballast_bytes or 0,
        session_retention_s=config.sessions.retention_s,
    )


def run_settings(config: Config) -> RunSettings:
    """What the configuration says about runs."""
    runs = config.runs
    return RunSettings(
        tool_timeout_s=runs.tool_timeout_s,
        tool_call_valid_for_s=runs.tool_call_valid_for_s,
        cancel_confirm_s=runs.cancel_confirm_s,
        max_active=runs.max_active,
        retention_s=runs.retention_s,
        max_retained=runs.max_retained,
        suspended_retention_s=runs.suspended_retention_s,
        bodies=config.ledger.bodies,
        max_sessions=config.sessions.max_sessions,
        max_history_bytes=config.sessions.max_history_bytes,
    )


def tools_settings(config: Config) -> tools.ToolsSettings:
    """What the configuration says about the daemon's own tools."""
    return tools.ToolsSettings(
        servers={name: _tool_server(server) for name, server in config.tools.servers.items()},
        allow={name: _allowed_tool(allowed) for name, allowed in config.tools.allow.items()},
        max_result_bytes=config.runs.max_tool_result_bytes,
        oom_score_adj=config.worker.oom_score_adj,
    )


def _tool_server(server: ToolServer) -> tools.Server:
    if server.url is not None:
        return tools.HttpServer(server.url, str(server.headers_file or "") or None)
    directory = str(server.directory or "") or None
    return tools.CommandServer(server.command, dict(server.environment), directory)


def _allowed_tool(allowed: AllowedTool) -> tools.AllowedTool:
    source = (
        tools.Builtin(allowed.builtin)
        if allowed.builtin is not None
        else tools.ServerTool(allowed.server or "", allowed.tool or "")
    )
    return tools.AllowedTool(
        source,
        SideEffect(allowed.side_effect or SideEffect.NON_IDEMPOTENT),
        timeout_s=allowed.timeout_s,
        rate_limit=allowed.rate_limit,
        needs_approval=allowed.needs_approval,
        resources=allowed.resources,
        verify=allowed.verify or "",
    )


def request_limits(
    config: Config,
    default_engine: Callable[[], str | None],
    daemon_tools: Mapping[str, Tool],
) -> RequestLimits:
    """What the configuration lets a request ask for."""
    runs = config.runs
    return RequestLimits(
        default_engine=default_engine,
        timeout_s=runs.timeout_s,
        max_timeout_s=runs.max_timeout_s,
        max_steps=runs.max_steps,
        max_tool_calls=runs.max_tool_calls,
        max_same_calls=runs.max_same_calls,
        durable=runs.durable,
        max_request_bytes=runs.max_request_bytes,
        max_tools=runs.max_tools,
        max_tool_result_bytes=runs.max_tool_result_bytes,
        slow_reader_s=runs.slow_reader_s,
        daemon_tools=daemon_tools,
    )
