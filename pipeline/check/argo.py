"""What Argo does about a step whose pod dies whole."""

import json
import shlex
from collections.abc import Mapping

import yaml

from components.kube import Json
from pipeline.check.finding import Finding, ok, warning

CONFIG = "workflow-controller-configmap"
"""Argo's configuration, where KFP runs."""


def retry_policy(config: Json | None, namespace: str | None) -> Finding:
    """Of Argo's configuration: what becomes of a step whose pod dies whole.

    The controller merges `templateDefaults` into every template, those that are no step too; what KFP writes into a step's has a
    limit and no policy. As KFP ships it the policy is OnError: a pod that is killed for its memory or evicted is Failed and not run
    again, one that is deleted or invalid is Error and tried `limit` + 1 times on each level of nesting (without a limit, for ever).
    `Always` with limit 0 gives a step the attempts that KFP wrote, and nothing else any. A strategy beside `templateDefaults` is
    that of templates without one.

    Source: mergedTemplateDefaultsInto, retryStrategy, processNodeRetries, inferFailedReason, workflow/controller/operator.go:4448,
    :4276, :1102, :1709 of Argo 4.0.5, RetryPolicyActual, pkg/apis/workflow/v1alpha1/workflow_types.go:2295 ("pod deleted" is
    operator.go:1289); getTaskRetryStrategyFromInput, backend/src/v2/compiler/argocompiler/container.go:667 of KFP 2.17.0, and
    manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml:56.
    """
    what = f"Argo's retries ({CONFIG} in {namespace})" if namespace else "Argo's retries"
    if config is None:
        return warning(
            what, f"are not known: no {CONFIG} was found", "ask KFP's administrator for Argo's templateDefaults.retryStrategy"
        )
    data = config.get("data") or {}
    defaults = _item(config, "workflowDefaults")
    spec = defaults.get("spec") or {}
    merged = (spec.get("templateDefaults") or {}).get("retryStrategy") or {}
    policy = merged.get("retryPolicy") or ("Always" if merged.get("expression") else "OnFailure")
    everywhere = merged or spec.get("retryStrategy") or {"limit": 0}
    limit = str(everywhere.get("limit", "none"))
    wrong = []
    if policy == "OnFailure":
        wrong.append("with OnFailure a step whose pod is deleted, as when a node is drained, is not run again")
    elif policy != "Always":
        wrong.append(f"with {policy} a step whose pod is killed for its memory or evicted is not run again")
    if limit != "0":
        what_fails = "a pod that is deleted or invalid" if policy == "OnError" else "what fails"
        wrong.append(f"with limit {limit} for every template {what_fails} is tried again on every level of the run")
    if not wrong:
        return ok(what, f"run a step whose pod dies again (retryPolicy {policy}, limit {limit})")
    return warning(
        what, "; ".join(wrong), f"its administrator decides, for it is everybody's: {_patched(data, defaults, namespace)}"
    )


def executor(config: Json | None) -> Json:
    """What Argo is told of its own containers in every pod."""
    return _item(config, "executor")


def artifact_secrets(config: Json | None) -> dict[str, tuple[str, ...]]:
    """Secret -> keys of those that Argo mounts into every pod to keep its log with: without them no pod starts."""
    store = _item(config, "artifactRepository").get("s3") or {}
    found: dict[str, tuple[str, ...]] = {}
    for wanted in (store.get("accessKeySecret"), store.get("secretKeySecret")):
        if wanted:
            found[wanted["name"]] = (*found.get(wanted["name"], ()), wanted["key"])
    return found


def _item(config: Json | None, key: str) -> Json:
    """One part of the configuration; empty where it is not there or not to be read.

    Source: parseConfigMap, config/controller.go:35 of Argo 4.0.5: one item `config`, or an item for every part.
    """
    data = (config or {}).get("data") or {}
    try:
        found = yaml.safe_load(data["config"]).get(key) if "config" in data else yaml.safe_load(data.get(key, ""))
    except (yaml.YAMLError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _patched(data: Mapping[str, str], defaults: Json, namespace: str | None) -> str:
    """The command that changes the retry strategy, and nothing else of what stands in that item."""
    spec = defaults.get("spec") or {}
    template = {**(spec.get("templateDefaults") or {}), "retryStrategy": {"limit": "0", "retryPolicy": "Always"}}
    wanted = {**defaults, "spec": {**spec, "templateDefaults": template}}
    if "config" in data:
        item = {"config": yaml.safe_dump({**yaml.safe_load(data["config"]), "workflowDefaults": wanted}, sort_keys=False)}
    else:
        item = {"workflowDefaults": yaml.safe_dump(wanted, sort_keys=False)}
    patch = shlex.quote(json.dumps({"data": item}))
    return f"kubectl -n {namespace} patch configmap {CONFIG} --type merge -p {patch}"
