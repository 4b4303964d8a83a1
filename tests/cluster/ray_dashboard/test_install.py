import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray_dashboard import install as installing
from cluster.ray_dashboard.install import MODULES, install, state, uninstall
from messages.errors import ConfigError

FILES = ("kvray_ray_dashboard.pth", "kvray_ray_dashboard.py")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_installed_seen_and_taken_away(tmp_path):
    assert not state(tmp_path).is_installed
    assert install(tmp_path).is_installed
    assert names(tmp_path) == sorted(FILES)
    assert install(tmp_path).is_installed  # again is no harm
    assert not uninstall(tmp_path).is_installed
    assert names(tmp_path) == []
    assert not uninstall(tmp_path).files


def test_what_another_kvray_installed_is_seen_and_put_right(tmp_path):
    install(tmp_path)
    (tmp_path / FILES[0]).write_text("import kvray_ray_dashboard; kvray_ray_dashboard.install('/gone', '2.60')\n")
    found = state(tmp_path)
    assert (found.is_installed, len(found.files)) == (False, 2)
    assert install(tmp_path).is_installed


@pytest.mark.parametrize(("version", "seen"), [("2.61.0", "got Ray 2.61.0 in"), (None, "got no Ray in")])
def test_another_ray_is_refused_in_one_line(tmp_path, monkeypatch, version, seen):
    def version_of(_name: str) -> str:
        if version is None:
            raise installing.PackageNotFoundError
        return version

    monkeypatch.setattr(installing, "version", version_of)
    with pytest.raises(ConfigError, match=seen) as refused:
        install(tmp_path)
    assert "want 2.60" in refused.value.message
    assert "\n" not in refused.value.message
    assert names(tmp_path) == []
    assert not state(tmp_path).fits


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / FILES[1]).mkdir()  # root may write anywhere else
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        install(tmp_path)


SEARCH = f"""
import sys
import {FILES[1].removesuffix(".py")} as finder
finder.install({{folder!r}}, {{version!r}})
import ray.dashboard.modules
print(ray.dashboard.modules.__path__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "version", "is_found"),
    [(str(MODULES), "2.60", True), (str(MODULES), "2.6", False), ("/gone", "2.60", False)],
)
def test_ray_finds_the_modules_where_it_is_the_one_they_are_for(tmp_path, folder, version, is_found):
    install(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SEARCH.format(folder=folder, version=version)],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (folder in done.stdout) == is_found
    assert "site-packages/ray/dashboard/modules" in done.stdout


def test_other_imports_are_none_of_the_finders_business():
    from cluster.ray_dashboard.finder import _Finder

    assert _Finder(str(MODULES), "2.60").find_spec("ray.dashboard") is None
    assert _Finder(str(MODULES), "2.60").find_spec("json") is None
