from models_page import COLUMNS, PAGE, ROOT, page

from sft_jax.model.family_table import FAMILIES


def test_the_page_has_the_table_that_the_tests_prove():
    assert PAGE.read_text() == page(), "run tests/model/models_page.py"


def test_every_family_trains_packs_and_exports():
    for name in ("full", "LoRA", "QLoRA", "packed", "export"):
        assert COLUMNS[name].families == set(FAMILIES), name


def test_the_tests_that_prove_it_exist():
    assert all((ROOT / column.test).is_file() for column in COLUMNS.values())
