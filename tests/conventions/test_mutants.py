"""Mutants have names that tell them apart, and what is listed as equivalent is there."""

from tests.mutation.mutants import mutants
from tests.mutation.mutate import nowhere

SOURCE = """
LIMIT: int = 3

@cache(5)
def first(count: Literal[1]) -> Literal[2]:
    "Text is left alone: 7."
    total = count + 1
    return 1 if total > 1 else 0

class Store:
    def change(self):
        self.forget()
        if self.total > LIMIT:
            return {"a": 1, "b": 1}
        self.forget()
"""


def test_each_has_a_name_of_its_own_that_says_where_it_is_and_what_it_changes():
    assert [mutant.name for mutant in mutants(SOURCE, "m", "m.py")] == [
        "m.<module>: LIMIT: int = 3 -> LIMIT: int = 4",
        "m.first: count + 1 -> count - 1",
        "m.first: count + 1 -> count + 2",
        "m.first: return 1 if total > 1 else 0 -> return None",
        "m.first: 1 if total > 1 else 0 -> 0 if total > 1 else 1",
        "m.first: total > 1 -> total >= 1",
        "m.first: total > 1 -> total > 2",
        "m.first: 1 if total > 1 else 0 -> 2 if total > 1 else 0",
        "m.first: 1 if total > 1 else 0 -> 1 if total > 1 else 1",
        "m.Store.change: self.forget() -> pass (1)",
        "m.Store.change: self.total > LIMIT -> self.total >= LIMIT",
        "m.Store.change: return {'a': 1, 'b': 1} -> return None",
        "m.Store.change: 'a': 1 -> 'a': 2",
        "m.Store.change: 'b': 1 -> 'b': 2",
        "m.Store.change: self.forget() -> pass (2)",
    ]


def test_a_mutant_is_the_module_with_that_one_change():
    mutant = next(each for each in mutants("A = 1\nB = 1\n", "m", "m.py") if "B" in each.name)
    values: dict[str, object] = {}
    exec(mutant.code, values)  # noqa: S102 - that is what a mutant is for
    assert (values["A"], values["B"], mutant.line) == (1, 2, 2)


def test_what_is_listed_as_equivalent_is_a_mutant_that_there_is():
    assert nowhere() == set()
