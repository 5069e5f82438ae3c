"""The demo's command: what it empties, and what it refuses. That its bars are met is checked by running it."""

from pathlib import Path

import pytest

from sft_jax.cli.demo import DEMO_CONFIG, DEMO_RUN_DIR, empty_run_dir, first_question, main
from sft_jax.command_line import read_config
from sft_jax.datatypes import ConfigError
from sft_jax.testbed.conversations import write_questions
from sft_jax.testbed.world import make_world


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A folder to work in, where a run of another day lies in the demo's folder and in one beside it."""
    monkeypatch.chdir(tmp_path)
    for name in (DEMO_RUN_DIR, "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")


def test_the_config_trains_in_the_demos_own_folder():
    assert read_config([f"--config={DEMO_CONFIG}"]).run.dir == DEMO_RUN_DIR


@pytest.mark.usefixtures("old_run")
def test_its_own_folder_is_emptied():
    empty_run_dir(Path(DEMO_RUN_DIR))
    assert not Path(DEMO_RUN_DIR).exists()
    assert Path("runs/mine/config.json").exists()


@pytest.mark.usefixtures("old_run")
def test_another_folder_is_never_touched():
    with pytest.raises(ConfigError, match=r"config\.run\.dir: runs/mine is already there"):
        main(["--config.run.dir=runs/mine"])
    assert Path("runs/mine/config.json").exists()
    assert Path(DEMO_RUN_DIR, "config.json").exists()


@pytest.mark.usefixtures("old_run")
def test_a_new_folder_needs_nothing():
    empty_run_dir(Path("runs/new"))


def test_the_question_to_ask_yourself_fits_in_shell_quotes():
    question = first_question(list(write_questions(make_world())))
    assert question
    assert "'" not in question
