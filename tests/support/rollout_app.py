"""A small application of Serve, to see how Serve rolls a config out."""

import os
import time

from ray import serve


@serve.deployment(name="version", ray_actor_options={"num_cpus": 0})
class Version:
    """Deployment that returns its version and its process."""

    def __init__(self, version, start_seconds):
        time.sleep(start_seconds)
        self.version = version

    def reconfigure(self, config):
        """Take another version without a restart."""
        self.version = config.get("version", self.version)

    def __call__(self):
        """The version, and the process that has it."""
        return self.version, os.getpid()


def build(args: dict[str, int]) -> serve.Application:
    """The application of a config."""
    return Version.bind(args["version"], args["start_seconds"])
