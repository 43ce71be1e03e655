"""The table of commands."""

from __future__ import annotations

from cyclopts import App

from kvstore import __version__
from kvstore.cli.bench import bench
from kvstore.cli.build import build
from kvstore.cli.calibrate import calibrate
from kvstore.cli.check import check
from kvstore.cli.completion import completion
from kvstore.cli.configuration import config_show
from kvstore.cli.doctor import doctor
from kvstore.cli.eval import evaluate
from kvstore.cli.explain import explain
from kvstore.cli.operate import drop, leases, policy
from kvstore.cli.plan import make_plan
from kvstore.cli.quota import quota_list, quota_remove, quota_set
from kvstore.cli.serve import serve
from kvstore.cli.status import status, top
from kvstore.cli.version import version

app = App(
    name="kvstore",
    version=f"kvstore {__version__}",
    help="Keep the attention keys and values that LLM engines computed, and hand them back at memory speed.",
    help_epilogue="Exit codes: 0 done, 1 something is wrong, 2 command line or setting, 3 daemon not reachable.",
    help_format="plaintext",
)
app["--version"].show = True

config = App(name="config", help="What the settings are and where they come from.")
config.command(config_show, name="show")

quota = App(name="quota", help="Who may have how much of the tiers.")
quota.command(quota_list, name="list")
quota.command(quota_set, name="set")
quota.command(quota_remove, name="remove")

app.command(serve)
app.command(status)
app.command(top)
app.command(explain)
app.command(leases)
app.command(check)
app.command(config)
app.command(quota)
app.command(policy)
app.command(drop)
app.command(build)
app.command(calibrate)
app.command(evaluate, name="eval")
app.command(make_plan, name="plan")
app.command(doctor)
app.command(bench)
app.command(completion)
app.command(version)
