"""Why a step failed, or waits: from its run's workflow and pods, because KFP does not say."""

from dataclasses import dataclass
from typing import Any, Self

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What a person should know of a step's pod."""

    step: str
    """`train S4/ntu60-xsub/j` as far as it is known."""
    pod: str
    why: str
    log: str
    """The command that shows what the step said."""


@dataclass(frozen=True, kw_only=True)
class Pods:
    """The pods of runs in one namespace, seen with a person's rights on Kubernetes."""

    api: Any
    """`kubernetes.client.ApiClient`."""
    namespace: str

    @classmethod
    def reach(cls, namespace: str) -> Self | None:
        """None where there is no kubeconfig, or it is not one."""
        from kubernetes import client, config

        try:
            config.load_config()
        except (config.ConfigException, OSError, ValueError):
            return None
        return cls(api=client.ApiClient(), namespace=namespace)

    def troubles(self, run: str) -> list[Trouble]:
        raise NotImplementedError
