"""What a plan chose as lines for a shell, as ``docker run``, and as manifests for Kubernetes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from chairlift.sim.plan.launch import Launch
from chairlift.sim.study import Autoscale

Target = Literal["shell", "docker", "k8s"]
PORT = {"vllm": 8000, "sglang": 30000}  # each engine's own default
WAITING = {"vllm": "vllm:num_requests_waiting", "sglang": "sglang:num_queue_reqs"}  # gauges of a replica's queue
KV = {"vllm": "vllm:kv_cache_usage_perc", "sglang": "sglang:token_usage"}
HPA_TOLERANCE = 0.1
RUNNING = {"vllm": "vllm:num_requests_running", "sglang": "sglang:num_running_reqs"}


def emitted(target: Target, name: str, parts: Sequence[Launch], beside: Sequence[str]) -> str:
    """The text of ``target`` for engines that together are called ``name``. What it does not say begins with #."""
    if target == "k8s":
        return _kubernetes(name, parts, beside)
    lines = shell(parts, beside) if target == "shell" else _docker(name, parts, beside)
    return "\n".join(lines) + "\n"


def shell(parts: Sequence[Launch], beside: Sequence[str]) -> list[str]:
    """A command line for each group of replicas, each with the engine's version behind it."""
    found = []
    for part in parts:
        found += [f"# {note}" for note in _heads(parts, part)]
        if part.argv:
            found.append(f"{shlex.join(part.argv)}  # {part.engine}")
    return [*found, *(f"# {line}" for line in beside)]


def _heads(parts: Sequence[Launch], part: Launch) -> list[str]:
    """What is said of a group before its command."""
    found = []
    if len(parts) > 1 or part.count > 1:
        each = f"{part.gpus} × {part.gpu} each"
        found.append(f"{part.count} {part.role} replica{'s' * (part.count > 1)}, {each}")
    return [*found, *part.notes]


def _docker(name: str, parts: Sequence[Launch], beside: Sequence[str]) -> list[str]:
    found = []
    for i, part in enumerate(parts):
        found += [f"# {note}" for note in _heads(parts, part)]
        if not part.argv:
            continue
        port = PORT[_kind(part)]
        head = ["docker", "run", "--rm", "--gpus", str(part.gpus), "--ipc", "host", "-p", f"{port}:{port}"]
        head += ["--name", _label(name, part, i, parts)]
        cache = "-v ~/.cache/huggingface:/root/.cache/huggingface --env HF_TOKEN"
        own = shlex.join(["--entrypoint", part.argv[0], part.image, *_reachable(part)[1:]])
        found.append(f"{shlex.join(head)} {cache} {own}")
    return [*found, *(f"# {line}" for line in beside)]


def _kubernetes(name: str, parts: Sequence[Launch], beside: Sequence[str]) -> str:
    head = [f"# {line}" for line in beside]
    documents: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        label = _label(name, part, i, parts)
        head += [f"# {label}: {note}" for note in (f"on nodes with {part.gpu}", *part.notes)]
        if part.argv:
            documents += [_deployment(label, part), _service(label, part)]
            if part.autoscale is not None:
                rule = _rule(label, part, part.autoscale)
                documents += [_scaled(label, part.autoscale, rule)] if rule is not None else []
                head += [f"# {label}: {note}" for note in _unsaid(part.autoscale, rule is not None)]
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120) if documents else ""
    return "\n".join(head) + "\n" * bool(head) + text


def _deployment(label: str, part: Launch) -> dict[str, Any]:
    port = PORT[_kind(part)]
    gpus = {"nvidia.com/gpu": part.gpus}
    container = {
        "name": "engine",
        "image": part.image,
        "command": [part.argv[0]],
        "args": _reachable(part)[1:],
        "ports": [{"name": "http", "containerPort": port}],
        "env": [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}}
        ],
        "resources": {"limits": gpus, "requests": gpus},
        "startupProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # tensor parallelism passes through it
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": label, "labels": {"app": label}},
        "spec": {
            "replicas": part.count,
            "selector": {"matchLabels": {"app": label}},
            "template": {
                "metadata": {"labels": {"app": label, "role": part.role}},
                "spec": {"containers": [container], "volumes": volumes},
            },
        },
    }


def _service(label: str, part: Launch) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": label, "labels": {"app": label}},
        "spec": {
            "selector": {"app": label},
            "ports": [{"name": "http", "port": PORT[_kind(part)], "targetPort": "http"}],
        },
    }


def _rule(label: str, part: Launch, scale: Autoscale) -> tuple[str, float] | None:
    """What KEDA asks of Prometheus, and the target of a replica; None: no query says the rule."""
    kind, own = _kind(part), f'{{app="{label}"}}'
    if scale.target_outstanding is not None:
        return f"sum({WAITING[kind]}{own}) + sum({RUNNING[kind]}{own})", scale.target_outstanding
    if scale.target_queued is not None:
        return f"sum({WAITING[kind]}{own})", scale.target_queued
    if scale.target_kv is not None:
        return f"sum({KV[kind]}{own})", scale.target_kv
    return None


def _scaled(label: str, scale: Autoscale, rule: tuple[str, float]) -> dict[str, Any]:
    """A ScaledObject of KEDA, which makes an HPA with the windows and limits that were simulated."""
    query, target = rule
    trigger = {"serverAddress": "http://prometheus:9090", "query": query, "threshold": f"{target:g}"}
    behavior = {}
    for way, window, most in (
        ("scaleUp", scale.stabilise_up_s, scale.most_up),
        ("scaleDown", scale.stabilise_down_s, scale.most_down),
    ):
        limit = {"type": "Pods", "value": most, "periodSeconds": max(1, round(scale.every_s))}
        percent = {"type": "Percent", "value": 10**6, "periodSeconds": 1}  # no limit
        behavior[way] = {"stabilizationWindowSeconds": round(window), "policies": [limit if most else percent]}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": label},
        "spec": {
            "scaleTargetRef": {"name": label},
            "pollingInterval": round(scale.every_s),
            "minReplicaCount": scale.min,
            "maxReplicaCount": scale.max,
            **({} if scale.idle_s is None else {"cooldownPeriod": round(scale.idle_s)}),
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
            "triggers": [{"type": "prometheus", "metadata": trigger}],
        },
    }


def _unsaid(scale: Autoscale, is_rule: bool) -> list[str]:
    """What was simulated of an autoscaler and stands in no manifest."""
    found = []
    if scale.saturation is not None:
        values = ", ".join(f"{key} {value:g}" for key, value in scale.saturation.model_dump().items())
        found.append(f"scaled by llm-d's Workload Variant Autoscaler: its thresholds are {values}")
    elif not is_rule:
        found.append("no rule of KEDA's: " + ", ".join(f"{k} {v}" for k, v in _given(scale).items()))
    if is_rule and scale.tolerance != HPA_TOLERANCE:
        found.append(
            f"a tolerance of {scale.tolerance:g} was simulated; an HPA has {HPA_TOLERANCE:g} unless told otherwise"
        )
    took = f"{scale.provision_s:g} s to come" + f" and {scale.load_s:g} s to load" * bool(scale.load_s)
    return [*found, f"a replica was taken to need {took}"]


def _given(scale: Autoscale) -> dict[str, Any]:
    return scale.model_dump(exclude_none=True, exclude_defaults=True)


def _kind(part: Launch) -> str:
    return "sglang" if part.engine.startswith("SGLang") else "vllm"


def _reachable(part: Launch) -> list[str]:
    """The words of the command, with the address on which a container is reached; vLLM listens on all by itself."""
    return [*part.argv, *(("--host", "0.0.0.0") if _kind(part) == "sglang" else ())]


def _label(name: str, part: Launch, i: int, parts: Sequence[Launch]) -> str:
    """A name that DNS takes: ``chat-8b``, or ``chat-8b-prefill-0`` of several groups."""
    own = f"{name}-{part.role}-{i}" if len(parts) > 1 else name
    return re.sub(r"[^a-z0-9]+", "-", own.lower()).strip("-")[:50].strip("-") or "engine"
