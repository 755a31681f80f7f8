"""Executor `container`: an attempt is a container of Docker or Podman on this machine."""

from dantegpu.daemon.executors.container.executor import ContainerExecutor, ContainerLimits

__all__ = ["ContainerExecutor", "ContainerLimits"]
