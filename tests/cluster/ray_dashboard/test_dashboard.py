"""The placement page on the port of Ray's own dashboard, and that it can never take that down."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray_dashboard.install import MODULES
from tests.cluster.ray_dashboard.ray_head import ROOT, dashboard_log, environment_beside, ray_head, run

#: An ingress as far as Ray's dashboard sees it.
INGRESS = """
import asyncio, os, ray
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from cluster.ray_dashboard.letter_boxes import LetterBoxes, RayKeyValues

async def data(request):
    return JSONResponse({"from": "an ingress"})

async def requests(request):
    return JSONResponse({"limit": request.query_params["limit"]}, 418)

async def main():
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
    routes = [Route("/cache/data", data), Route("/v1/route", requests)]
    LetterBoxes(RayKeyValues(), Starlette(routes=routes).router).start()
    print("looking", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""

#: What Ray's head does with the modules of its dashboard, an error of one of which ends it.
LOAD = """
import sys
sys.path.insert(0, {finders!r})
import kvray_finder
kvray_finder.install({folder!r}, "2.60")
from ray.dashboard.utils import DashboardHeadModule, get_all_modules
print(sorted(module.__name__ for module in get_all_modules(DashboardHeadModule)))
"""


@pytest.mark.alone
def test_the_page_is_on_rays_port_behind_rays_token_and_asks_an_ingress(tmp_path):
    python = environment_beside(tmp_path / "environment")
    assert "installed in" in run(python, "dashboard", "install").stdout
    with ray_head(python) as head:
        assert head.get("/kvray/cache/data", with_token=False)[0] == 401
        assert head.get("/kvray/cache", with_token=False)[0] == 401
        status, page = head.get("/kvray")  # by way of /kvray/cache
        assert (status, "cache/app.js" in page) == (200, True)
        assert head.get("/kvray/cache/app.js")[0] == 200
        assert head.get("/kvray/cache/index.htm")[0] == 404
        ingress = subprocess.Popen(
            [python, "-c", INGRESS], env=head.variables, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert ingress.stdout is not None
            assert ingress.stdout.readline() == "looking\n"
            assert head.get("/kvray/cache/data") == (200, '{"from":"an ingress"}')
            assert head.get("/kvray/v1/route?limit=7") == (418, '{"limit":"7"}')
            assert head.get("/kvray/v1/route/r1")[0] == 404
        finally:
            ingress.kill()
            ingress.wait()
        assert "kvray is not shown" not in dashboard_log(head)


def loaded(tmp_path: Path, folder: Path) -> list[str]:
    finders = tmp_path / "finders"
    finders.mkdir()
    shutil.copy(MODULES.parent / "finder.py", finders / "kvray_finder.py")
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(finders=str(finders), folder=str(folder))],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


@pytest.mark.slow
def test_ray_loads_the_page_beside_its_own_modules(tmp_path):
    found = loaded(tmp_path, MODULES)
    assert {"KvrayPlacementPage", "UsageStatsHead"} <= set(found)


@pytest.mark.slow
def test_a_page_that_is_broken_is_left_out_and_rays_own_modules_are_not(tmp_path):
    shutil.copytree(MODULES, tmp_path / "a" / "b" / "head_modules")  # without the files that it reads
    found = loaded(tmp_path, tmp_path / "a" / "b" / "head_modules")
    assert "KvrayPlacementPage" not in found
    assert "UsageStatsHead" in found


@pytest.mark.long
@pytest.mark.alone
def test_where_no_kvray_serves_the_page_is_told_so(tmp_path):
    python = environment_beside(tmp_path / "environment")
    run(python, "dashboard", "install")
    with ray_head(python) as head:
        status, body = head.get("/kvray/cache/data")
        assert (status, "no kvray on this Ray cluster answers" in body) == (504, True)
        assert head.get("/api/version")[0] == 200
    assert not (run(python, "dashboard", "uninstall", "--json").returncode)
    with ray_head(python) as head:
        assert head.get("/kvray/cache")[0] == 404
