"""P5, open set: how ranks are started."""
from pyfleet.launchers.base import Job, Launcher

LAUNCHERS = {
    "join": "pyfleet.launchers.join:JoinLauncher",
    "local": "pyfleet.launchers.local:LocalLauncher",
    "ssh": "pyfleet.launchers.ssh:SshLauncher",
    "tmux": "pyfleet.launchers.tmux:TmuxLauncher",
}

__all__ = ["LAUNCHERS", "Job", "Launcher"]
