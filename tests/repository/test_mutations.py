"""The faults that ``mutations.py`` puts into the code still fit it."""

import pytest
from mutations import MUTATIONS, source
from processes import ROOT

pytestmark = pytest.mark.once


@pytest.mark.parametrize("fault, file, original, faulty, test", MUTATIONS, ids=[mutation[0] for mutation in MUTATIONS])
def test_fault_fits_the_code(fault, file, original, faulty, test):
    text = source(ROOT, file).read_text()
    assert text.count(original) == 1
    compile(text.replace(original, faulty), file, "exec")
    name = test.split("::")[1].split("[")[0]
    assert f"def {name}(" in (ROOT / test.split("::")[0]).read_text()
