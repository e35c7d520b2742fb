"""The suite on pairs whose faults were planted: the figure that is made for each must find it."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.evaluate import truth
from nlae_jax.evaluate.cost import Asked, Extras, answers, cost_text, costs
from nlae_jax.evaluate.figures import BY_NAME, FIGURES, SECTIONS
from nlae_jax.evaluate.kept import Kept
from nlae_jax.evaluate.reconstruction import UNINFORMED, direction_mse, variances
from nlae_jax.evaluate.rewordings import REWORDINGS
from nlae_jax.evaluate.rows import SUFFIX, kinds, likeliest, shared_reads, spread
from nlae_jax.evaluate.sections.truth import BEFORE, _continued
from nlae_jax.evaluate.suite import check_additions, run_suite, sections_of
from nlae_jax.evaluate.work import Work
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from tests.planted_pairs import SIZES, planted, planted_rows
from tests.test_tokens import EOS, adding


@pytest.fixture(scope="module")
def rows(tiny_lm):
    return planted_rows(tiny_lm)


def number_of(text):
    """The row that a planted explanation names, or None."""
    digits = "".join(character for character in text if character.isdigit())
    return int(digits) if digits else None


class Plants:
    """Pairs by name: what they write about a row, and what they rebuild from a text."""

    def __init__(self, rows, tokenizer):
        self.rows, self.tokenizer = rows, tokenizer
        self.mean = rows.h.mean(0)

    def by_number(self, text):
        """A decoder that looks up the number in the text; the mean without one."""
        number = number_of(text)
        return self.rows.h[number] if number is not None and number < len(self.rows.h) else self.mean

    def ending(self, row, words=6):
        return " ".join(self.rows.contexts[row].split()[-words:])

    def of_ending(self, text):
        """A decoder that rebuilds from the last words of the context alone."""
        for row in range(len(self.rows.h)):
            if f'"{self.ending(row)}"' in text:
                return self.rows.h[row]
        return self.mean

    def pairs(self):
        order = ["moon", "river", "stone", "lamp", "horse"]

        def permutation(row):
            """The same five words, in an order that spells the row."""
            left, found, number = list(order), [], row
            for base in (5, 4, 3, 2, 1):
                found.append(left.pop(number % base))
                number //= base
            return " ".join(found) + "."

        spelled = {permutation(row): row for row in range(len(self.rows.h))}
        row_of = lambda text: spelled.get(text)  # noqa: E731
        by_order = lambda text: self.mean if row_of(text) is None else self.rows.h[row_of(text)]  # noqa: E731
        return {
            "perfect": (lambda row, n: f"The text is number {row}.", self.by_number),
            "constant": (lambda row, n: "The text is about a horse.", lambda text: self.mean),
            "copy": (lambda row, n: f'It ends "{self.ending(row)}".', self.of_ending),
            "code": (lambda row, n: permutation(row), by_order),
            "last": (lambda row, n: f"A horse is there. A lamp is there. It has {row}.", self.by_number),
            "noise": (lambda row, n: f"The text is number {(row + 7 * n) % len(self.rows.h)}.", self.by_number),
            "half": (lambda row, n: f"It is {row}." if row % 2 else "It is unknown.", self.by_number),
            "silent": (lambda row, n: "", self.by_number),
        }


@pytest.fixture(scope="module")
def suite_of(tiny_lm, rows, tmp_path_factory):
    """Sections of a planted pair's suite."""
    plants, found = Plants(rows, tiny_lm.tokenizer).pairs(), {}

    def run(name, sections=("reconstruction", "text")):
        if (name, sections) not in found:
            pair = planted(tiny_lm, rows, *plants[name], name)
            work = Work(pair, rows, tmp_path_factory.mktemp(name), 0, 200, SIZES)
            found[name, sections] = run_suite(work, sections)
        return found[name, sections]

    return run


def value(result, section, key, part=None, control=None):
    entry = result[section][key]
    if part is not None:
        entry = entry["parts"][part]
    if control is not None:
        entry = entry["controls"][control]
    return entry["value"]


# --- a perfect pair


def test_a_perfect_pair_has_everything(suite_of):
    found = suite_of("perfect")
    assert value(found, "reconstruction", "fve") == pytest.approx(1, abs=1e-6)
    assert value(found, "reconstruction", "fve_meannorm") == pytest.approx(1, abs=1e-6)
    assert value(found, "reconstruction", "cos") == pytest.approx(1, abs=1e-6)
    assert value(found, "reconstruction", "retrieval_top1") == 1
    most = value(found, "reconstruction", "retrieval_bits", control="most")
    assert value(found, "reconstruction", "retrieval_bits") == pytest.approx(most, abs=1e-3)
    assert value(found, "reconstruction", "agreement") == pytest.approx(1, abs=1e-5)
    assert value(found, "reconstruction", "centred_gap", control="own") == pytest.approx(1, abs=1e-5)
    assert value(found, "text", "fve_text") == pytest.approx(1, abs=1e-6)


def test_its_explanations_of_other_activations_are_worth_nothing(suite_of):
    found = suite_of("perfect")
    assert value(found, "reconstruction", "fve", control="permuted") < -0.5
    assert value(found, "reconstruction", "retrieval_bits", control="permuted") < 0.2
    assert value(found, "reconstruction", "retrieval_top1", control="permuted") == 0
    assert abs(value(found, "reconstruction", "centred_gap", control="permuted")) < 0.2
    assert value(found, "reconstruction", "best_of", control="permuted") < 0


# --- a constant pair


def test_a_constant_pair_carries_nothing(suite_of):
    found = suite_of("constant")
    # The mean as a direction is renormalised: below 0 by the paper's definition, 0 by the other.
    assert value(found, "reconstruction", "fve") < 0
    assert value(found, "reconstruction", "fve_meannorm") == pytest.approx(0, abs=0.02)
    for key in ("fve", "cos"):
        assert value(found, "reconstruction", key) == pytest.approx(
            value(found, "reconstruction", key, control="permuted"), abs=1e-6
        )
    assert value(found, "reconstruction", "centred_gap") == pytest.approx(0, abs=1e-9)
    assert value(found, "reconstruction", "retrieval_bits") < 0.05
    assert value(found, "reconstruction", "equivalent_rank") == 0
    assert value(found, "reconstruction", "cos") > 0.4  # which is why a cosine alone says nothing


def test_health_finds_the_constant(suite_of):
    health = suite_of("constant", ("health",))["health"]
    assert health["distinct_explanations"]["value"] == pytest.approx(1 / 40)
    assert health["changed_words"]["value"] == 0


def test_explanations_that_the_limit_cut_are_counted(tiny_lm, rows, tmp_path):
    """Beside those that ended by themselves without a closing tag: both cannot be read."""
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["silent"], "silent")
    calls = itertools.count()

    def explain(vectors, seed):
        return pair.explain(vectors, seed)._replace(truncated=np.full(len(vectors), next(calls) < 2))

    found = run_suite(Work(pair._replace(explain=explain), rows, tmp_path, 0, 50, SIZES), ("health",))["health"]
    assert found["extraction_rate"]["value"] == 0
    assert found["truncated_rate"]["value"] == pytest.approx(16 / 40) and found["truncated_rate"]["n"] == 40
    assert found["truncated_rate"]["ci95"][0] < 0.4 < found["truncated_rate"]["ci95"][1]


# --- copying


def test_a_copying_pair_is_found_by_its_copied_bits_and_not_by_fve(suite_of):
    copied, honest = suite_of("copy"), suite_of("perfect")
    assert value(copied, "reconstruction", "fve") == pytest.approx(1, abs=1e-6)
    assert value(copied, "text", "copied_bits") > 5
    assert value(copied, "text", "copied_bits", control="permuted") < 0.5
    assert value(honest, "text", "copied_bits") == 0
    # All of it stands in the quotation.
    assert value(copied, "text", "fve_quotes_only") == pytest.approx(1, abs=1e-6)
    assert value(copied, "text", "fve_quotes_removed") < 0
    assert honest["text"]["fve_quotes_removed"]["n"] == 0  # it quotes nothing


# --- a code


def test_a_code_in_the_order_of_words_dies_when_they_are_shuffled(suite_of):
    code, honest = suite_of("code"), suite_of("perfect")
    assert value(code, "reconstruction", "fve") == pytest.approx(1, abs=1e-6)
    assert value(code, "text", "fve_words_shuffled") < 0.3
    assert value(code, "text", "fve_words_shuffled", control="whole") == pytest.approx(1, abs=1e-6)
    assert value(honest, "text", "fve_words_shuffled") == pytest.approx(1, abs=1e-6)
    # Health sees no template: all explanations are different, and none has a word that others lack.
    health = suite_of("code", ("health",))["health"]
    assert health["distinct_explanations"]["value"] == 1 and health["changed_words"]["value"] == 0


# --- everything in the last sentence


def test_what_stands_in_the_last_sentence_is_lost_with_it(suite_of):
    found = suite_of("last")
    lost = {part: value(found, "text", "dropped_sentence", part) for part in ("last", "other")}
    assert lost["last"] > 1 and lost["other"] == pytest.approx(0, abs=1e-6)
    marginal = {part: value(found, "text", "marginal_fve", part) for part in ("1", "2", "3", "4", "rest")}
    assert marginal["3"] > 1 and marginal["2"] == marginal["4"] == marginal["rest"] == 0
    assert sum(marginal.values()) == pytest.approx(value(found, "text", "fve_text"), abs=1e-9)


def test_what_sentences_add_is_what_they_are_worth_on_the_same_rows(tiny_lm, rows, tmp_path):
    """Of fewer rows than fve_text is of, the parts add up to the figure's own value."""
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["half"], "half")
    found = run_suite(Work(pair, rows, tmp_path, 0, 50, SIZES._replace(text=10)), ("text",))
    marginal = found["text"]["marginal_fve"]
    assert marginal["n"] == 10 < found["text"]["fve_text"]["n"]
    for of in (lambda part: part, lambda part: part["controls"]["permuted"]):
        assert sum(of(part)["value"] for part in marginal["parts"].values()) == pytest.approx(of(marginal)["value"])


# --- an encoder that says another thing each time


def test_samples_that_disagree(suite_of):
    noise, perfect = suite_of("noise"), suite_of("perfect")
    assert value(noise, "reconstruction", "agreement") < 0.5 < value(perfect, "reconstruction", "agreement")
    best = {part: value(noise, "reconstruction", "best_of", part) for part in ("1", "2", "4")}
    assert best["1"] < best["2"] < best["4"]
    assert all(value(perfect, "reconstruction", "best_of", part) == pytest.approx(1, abs=1e-6) for part in best)


def test_nothing_is_agreed_on_where_nothing_can_be_read(suite_of):
    found = suite_of("silent", ("reconstruction",))
    assert (
        value(found, "reconstruction", "agreement") == value(found, "reconstruction", "agreement", control="other") == 0
    )
    health = suite_of("silent", ("health",))["health"]
    assert {key: (of["value"], of["n"]) for key, of in health.items() if "rate" not in key} == {
        key: (None, 0) for key in health if "rate" not in key
    }
    assert value(found, "reconstruction", "retrieval_bits") == pytest.approx(0, abs=1e-9)


# --- by what activations are of


def test_fve_of_each_kind_of_text_is_that_of_its_own_rows(suite_of, rows):
    """Explanations of odd rows are perfect, and those of even rows the mean."""
    found = suite_of("half", ("reconstruction",))
    named = np.array([row % 2 == 1 for row in range(len(rows.h))])
    mean = np.broadcast_to(rows.h.mean(0), rows.h.shape)
    mse = np.where(named, 0, direction_mse(mean, rows.h))
    for kind in ("kind 0", "kind 1"):
        here = np.array(rows.domain) == kind
        expected = 1 - mse[here].mean() / variances(rows.h)[here].mean()
        assert value(found, "reconstruction", "fve_by_domain", kind) == pytest.approx(expected, abs=1e-6)
        part = found["reconstruction"]["fve_by_domain"]["parts"][kind]
        assert part["n"] == here.sum() and part["controls"]["permuted"]["value"] < 0 < part["value"]


def test_kinds_that_are_too_many_are_put_together():
    assert kinds(["a", "b", "a"], [0, 1, 2]) == ["a", "b", "a"]
    many = [f"site {number}" for number in range(30)] * 2 + ["site 7"] * 3
    documents = range(len(many))
    named = kinds(many, documents, most=4)
    assert set(named) == {"site 7", "site 0", "site 1", "other kinds"} and named.count("other kinds") == 54
    assert [name for name, given in zip(named, many, strict=True) if given == "site 7"] == ["site 7"] * 5
    unknown = kinds([*many, ""], [*documents, 100], most=4)
    assert unknown == [*named, ""]
    assert kinds(["a", "a", "b", "b", "", ""], range(6), most=2) == ["a", "a", "b", "b", "", ""]


def test_kinds_of_one_document_are_put_together():
    """Several rows of one document are no more than one: there would be no interval."""
    assert kinds(["a", "a", "b", "b", "c", "c"], [0, 0, 1, 1, 2, 3]) == ["other kinds"] * 4 + ["c"] * 2
    assert kinds(["a", "a", "c", "c"], [0, 0, 2, 3]) == ["a", "a", "c", "c"]
    assert set(kinds([f"page {number}" for number in range(9)], range(9))) == {"other kinds"}


# --- next tokens


@pytest.mark.parametrize("reads_it", [True, False])
def test_a_twin_is_found_by_a_decoder_that_reads_the_next_token(tiny_lm, rows, tmp_path, reads_it):
    expected = [tokens[0] for (tokens,) in likeliest(tiny_lm, [[ids] for ids in rows.context_ids], 1)]
    plants = Plants(rows, tiny_lm.tokenizer)
    write = lambda row, n: f'Next comes "{expected[row].strip() or "a"}". It is {row}.'  # noqa: E731

    def read(text):
        row = int(text.rpartition(" ")[2].strip(".") or 0) if text.rpartition(" ")[2].strip(".").isdigit() else None
        if row is None or (reads_it and f'"{expected[row].strip()}"' not in text):
            return plants.mean
        return rows.h[row]

    found = run_suite(Work(planted(tiny_lm, rows, write, read, "twin"), rows, tmp_path, 0, 50, SIZES), ("text",))
    for part in ("rank 2 to 4", "rank 8 and beyond"):
        assert found["text"]["twin"]["parts"][part]["n"] > 10
        assert value(found, "text", "twin", part) == (1 if reads_it else 0.5)
        beside = found["text"]["twin"]["parts"][part]["controls"]["permuted"]
        assert beside["n"] > 10
        # About another's activation, the mean that is left of the twin is the better guess.
        assert beside["value"] < 0.2 if reads_it else beside["value"] == 0.5


# --- descriptions


def test_descriptions_stand_beside_what_is_said(tiny_lm, rows, tmp_path):
    gold = [f'It ends "{" ".join(context.split()[-6:])}".' for context in rows.contexts]
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["constant"], "constant")
    found = run_suite(Work(pair, rows._replace(gold=gold), tmp_path, 0, 50, SIZES), ("text", "truth", "health"))
    assert value(found, "truth", "quotes_in_context", control="gold") == 1
    assert value(found, "truth", "words_in_context") < value(found, "truth", "words_in_context", control="gold")
    assert value(found, "text", "copied_bits") == 0 < value(found, "text", "copied_bits", control="gold")
    assert value(found, "health", "distinct_explanations") < value(
        found, "health", "distinct_explanations", control="gold"
    )
    assert value(found, "health", "repeated_rate", control="gold") is not None
    # Of some rows alone, their variety could not be compared.
    some = run_suite(Work(pair, rows._replace(gold=[*gold[:-1], ""]), tmp_path, 0, 50, SIZES), ("health",))
    assert "controls" not in some["health"]["distinct_1"]


# --- meaning


def test_splicing_a_perfect_pair_changes_nothing_and_a_constant_one_is_the_mean(suite_of):
    perfect, constant = (suite_of(name, ("meaning",)) for name in ("perfect", "constant"))
    for key in ("kl_next", "kl_following"):
        assert value(perfect, "meaning", key) == value(perfect, "meaning", key, control="true") == 0
        assert value(perfect, "meaning", key, control="permuted") > 1e-6
    assert (
        value(perfect, "meaning", "loss_recovered") == value(perfect, "meaning", "loss_recovered", control="true") == 1
    )
    mean = value(constant, "meaning", "kl_next", control="mean")
    # The planted mean is of the activations, the control's of their directions.
    assert value(constant, "meaning", "kl_next") == pytest.approx(mean, rel=0.3)
    assert value(perfect, "meaning", "kl_next", control="isotropic") < 1e-5  # no error, in whatever direction


def test_activations_of_other_texts_are_noticed(tiny_lm, rows, tmp_path, capsys):
    plants = Plants(rows, tiny_lm.tokenizer).pairs()
    h = rows.h.copy()
    h[3:6] = -h[3:6]
    for name, activations, said in (("right", rows.h, False), ("wrong", h, True)):
        work = Work(
            planted(tiny_lm, rows, *plants["constant"], name), rows._replace(h=activations), tmp_path, 0, 50, SIZES
        )
        found = run_suite(work, ("meaning",))
        assert (value(found, "meaning", "kl_next", control="true") > 0) == said
        assert ("in 3 of 40 rows the stored activation is not the subject's" in capsys.readouterr().err) == said


# --- truth


def test_quotations_of_the_context_are_true_and_of_another_are_not(suite_of):
    found = suite_of("copy", ("truth",))
    assert value(found, "truth", "quotes_in_context") == 1
    assert value(found, "truth", "quotes_in_context", control="permuted") == 0
    assert value(found, "truth", "words_in_context") > value(found, "truth", "words_in_context", control="permuted")
    assert value(found, "truth", "consensus_precision") == 1
    constant = suite_of("constant", ("truth",))["truth"]
    assert constant["quotes_in_context"]["n"] == 0 and constant["words_in_context"]["n"] == 40  # it quotes nothing


# --- quotations where some explanations have none


def test_explanations_without_quotations_are_left_out_of_the_figures_of_quotations(tiny_lm, rows, tmp_path):
    plants = Plants(rows, tiny_lm.tokenizer)
    write = lambda row, n: f'It is "{row}".' if row % 3 else f"It is {row}."  # noqa: E731
    pair = planted(tiny_lm, rows, write, plants.by_number, "quotes")
    found = run_suite(Work(pair, rows, tmp_path, 0, 50, SIZES), ("text",))
    for key in ("fve_quotes_only", "fve_quotes_removed"):
        assert found["text"][key]["n"] == found["text"][key]["controls"]["whole"]["n"] == 26
        assert 0 < found["text"][key]["controls"]["permuted"]["n"] < 26  # those whose other explanation quotes, too
    assert value(found, "text", "fve_quotes_only") == pytest.approx(1, abs=1e-6)
    assert value(found, "text", "fve_quotes_removed") < 0 < value(found, "text", "fve_quotes_removed", control="whole")
    assert found["text"]["fve_lower_case"]["n"] == 40


# --- the form of the results


def test_every_figure_has_an_interval_a_count_and_the_controls_that_the_table_names(suite_of):
    found = suite_of("copy", SECTIONS)
    assert set(found) == {*SECTIONS, "suite"}
    reported = {(section, key) for section in SECTIONS for key in found[section]}
    trained = ("trained_decoder", "beyond_last_words", "beyond_next_tokens")
    asked = {("truth", "judged_support"), ("truth", "judged_choice")}
    assert reported == BY_NAME.keys() - {("text", name) for name in (*trained, *REWORDINGS)} - asked
    for section, key in reported:
        entry, figure = found[section][key], BY_NAME[section, key]
        assert set(entry.get("controls", {})) == set(figure.controls) - {"gold"}
        assert ("parts" in entry) == bool(figure.parts)
        parts = entry.get("parts", {}).values()
        assert all(set(part.get("controls", {})) == set(figure.part_controls) for part in parts)
        beside = [of for one in (entry, *parts) for of in one.get("controls", {}).values()]
        for of in (entry, *parts, *beside):
            if of.get("value") is not None and of["documents"] > 1:
                low, high = of["ci95"]
                assert None in (low, high) or low <= high
                assert of["n"] > 0


def test_keys_are_of_one_figure_each():
    assert len(BY_NAME) == len(FIGURES)
    assert {figure.section for figure in FIGURES} == set(SECTIONS)


# --- what it costs


def test_what_is_asked_for_beside_the_suite_costs_more(tiny_lm, rows):
    asked = Asked(rows, SIZES, 0, SECTIONS)
    plain, trained = (costs(asked._replace(extras=Extras(control_steps=steps))) for steps in (0, 10))
    more = trained["text"].read - plain["text"].read
    assert more == 3 * (3 * 10 * 16 + 10) * 50 + sum(map(len, rows.context_ids))
    assert {name: cost for name, cost in trained.items() if name != "text"} == {
        name: cost for name, cost in plain.items() if name != "text"
    }
    # Three answers for each explanation that is reworded, and three for each that is judged.
    asked = asked._replace(extras=Extras(0, True, True))
    assert answers(asked) == 3 * 40 + 3 * 16
    assert answers(asked._replace(sections=("health", "text"))) == 3 * 40
    line = cost_text(Asked(rows, SIZES, 0, ("health",)), tiny_lm.arch)
    assert line.startswith("eval: 40 activations, 40 explanations, about ")
    assert "asked" not in line and "in all: health" in line
    asked = Asked(rows, SIZES, 0, ("text", "truth"), Extras(judges=True), reading=1000)
    line = cost_text(asked, tiny_lm.arch)
    assert line.endswith("another language model is asked 48 times at most")
    assert "in all: activations " in line


@pytest.mark.slow
def test_the_explanations_that_are_counted_first_are_those_that_are_written(tiny_lm, rows, tmp_path):
    """Of every choice of sections, and whether fewer or more rows are sampled than there are."""
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["perfect"], "perfect")
    short = rows._replace(context_ids=[ids[:8] if row % 2 else ids for row, ids in enumerate(rows.context_ids)])
    choices = [SECTIONS, ("reconstruction",), ("truth",), ("text", "truth"), ("reconstruction", "health"), ("health",)]
    for number, (sections, sampled, of) in enumerate(itertools.product(choices, (5, 99), (rows, short))):
        written = []

        def explain(vectors, seed, written=written):
            written.append(len(vectors))
            return pair.explain(vectors, seed)

        sizes = SIZES._replace(sampled=sampled)
        work = Work(pair._replace(explain=explain), of, tmp_path / str(number), 0, 20, sizes)
        asked = Asked(of._replace(h=of.h[:0]), sizes, 0, sections)  # before the activations are read
        said = {section: cost.explanations for section, cost in costs(asked).items()}
        line = cost_text(asked, tiny_lm.arch)
        found = run_suite(work, sections)
        assert sum(said.values()) == sum(written)
        assert found["suite"]["explanations"] == said
        assert f" {sum(written):,} explanations, " in line


# --- next tokens of texts that begin each other


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12)


@given(TEXTS, st.integers(1, 4))
def test_every_text_is_read_once_and_begins_the_first_of_its_group(texts, most):
    groups = shared_reads(texts, most)
    assert sorted(number for group in groups for number in group) == list(range(len(texts)))
    for group in groups:
        longest = texts[group[0]]
        assert len(group) <= most and all(longest[: len(texts[number])] == texts[number] for number in group)
    if most > len(texts):  # no text is read by itself that another one begins with
        leaders = [texts[group[0]] for group in groups]
        assert not any(a != b and b[: len(a)] == a for a in leaders for b in leaders)


def test_shared_reads_predict_what_each_text_predicts_alone(tiny_lm, rows):
    ids = rows.context_ids[0]
    contexts = [ids, ids[:-3], ids[:5]]
    assert likeliest(tiny_lm, [contexts], 5)[0] == [
        tokens for (tokens,) in likeliest(tiny_lm, [[c] for c in contexts], 5)
    ]


# --- rows that several explanations are of


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.integers(0, 70),
    st.integers(0, 3),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_rows_are_spread_over_documents(documents, count, seed, allowed):
    """No document has a second row while another has none that could be drawn; all rows where as many are asked for."""
    document, among = np.array(documents), np.flatnonzero(allowed[: len(documents)])
    found = spread(document, count, seed, among)
    assert found.tolist() == sorted(set(found.tolist())) and set(found.tolist()) <= set(among.tolist())
    assert len(found) == min(count, len(among))
    drawn, there = (Counter(document[of].tolist()) for of in (found, among))
    most = max(drawn.values(), default=0)
    assert all(drawn[name] >= min(most - 1, there[name]) for name in there)
    assert found.tolist() == spread(document, count, seed, among).tolist()
    assert set(found.tolist()) <= set(spread(document, count + 1, seed, among).tolist())


def test_the_seed_draws_other_rows():
    document = np.repeat(np.arange(20), 4)
    drawn = [spread(document, 10, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({row % 4 for row in drawn[0]}) > 1  # also among the rows of a document


@pytest.mark.parametrize("sampled", [7, 25, 1000])
def test_figures_of_several_explanations_say_how_many_rows_they_are_of(tiny_lm, rows, tmp_path, sampled):
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["noise"], "noise")
    work = Work(pair, rows, tmp_path, 0, 20, SIZES._replace(sampled=sampled))
    found = run_suite(work, ("reconstruction", "truth"))
    count = min(sampled, 40)
    of_some = (("reconstruction", "best_of"), ("reconstruction", "agreement"), ("truth", "consensus_words"))
    entries = [found[section][key] for section, key in of_some]
    entries += [found["reconstruction"]["fve"]["controls"][name] for name in UNINFORMED]
    assert {(entry["n"], entry["documents"]) for entry in entries} == {(count, min(sampled, 10))}
    assert found["truth"]["recurrence"]["n"] == count
    assert found["reconstruction"]["fve"]["n"] == 40 and found["suite"]["num_sampled"] == dict.fromkeys(
        ("reconstruction", "truth"), count
    )


def test_figures_of_several_samples_share_them(tiny_lm, rows, tmp_path):
    """They are drawn once, and the figures are what these samples give."""
    asked = Counter()
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["perfect"], "perfect")

    def explain(vectors, seed):
        asked[seed] += len(vectors)
        return pair.explain(vectors, seed)

    work = Work(pair._replace(explain=explain), rows, tmp_path, 0, 20, SIZES)
    some, texts, rebuilt = work.sampled
    assert rebuilt.shape[:2] == (len(texts), len(texts[0])) == (SIZES.sampled, SIZES.samples)
    before = asked.total()
    found = run_suite(work, ("reconstruction", "truth"))
    # The rest: one of every row, of vectors that say nothing, and of the tokens before.
    assert asked.total() - before == 40 + SIZES.sampled * (3 + BEFORE)
    agreed = [truth.precision(truth.consensus(each), rows.contexts[row]) for row, each in zip(some, texts, strict=True)]
    assert found["truth"]["consensus_words"]["value"] == pytest.approx(np.mean([said for _, said in agreed]))
    mse = np.stack([direction_mse(rebuilt[:, number], rows.h[some]) for number in range(SIZES.samples)], 1)
    expected = 1 - mse.min(1).mean() / variances(rows.h)[some].mean()
    assert value(found, "reconstruction", "best_of") == pytest.approx(expected)


def test_other_rows_are_sampled_anew_and_the_rest_is_kept(tiny_lm, rows, tmp_path):
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["perfect"], "perfect")
    written = []

    def explain(vectors, seed):
        written.append(len(vectors))
        return pair.explain(vectors, seed)

    for sampled, expected in ((6, 40 + 6 * (3 + 4)), (8, 8 * (3 + 4)), (6, 0)):
        written.clear()
        work = Work(pair._replace(explain=explain), rows, tmp_path, 0, 20, SIZES._replace(sampled=sampled))
        found = run_suite(work, ("reconstruction",))
        assert sum(written) == expected and found["reconstruction"]["agreement"]["n"] == sampled


# --- resuming


def test_what_is_done_is_not_done_again(tiny_lm, rows, tmp_path):
    plants = Plants(rows, tiny_lm.tokenizer).pairs()
    pair = planted(tiny_lm, rows, *plants["noise"], "noise")  # which says another thing when it is asked again
    first = run_suite(Work(pair, rows, tmp_path, 0, 50, SIZES), ("reconstruction",))

    def refuse(*_):
        raise AssertionError("asked again")

    asked_again = pair._replace(explain=refuse, reconstruct_ids=refuse)
    again = run_suite(Work(asked_again, rows, tmp_path, 0, 50, SIZES), ("reconstruction",))
    assert again["reconstruction"] == first["reconstruction"]
    # Of another pair nothing is taken over.
    with pytest.raises(AssertionError, match="asked again"):
        run_suite(Work(asked_again._replace(identity="other"), rows, tmp_path, 0, 50, SIZES), ("reconstruction",))


def test_a_suite_that_was_stopped_goes_on_where_it_was(tiny_lm, rows, tmp_path):
    plants = Plants(rows, tiny_lm.tokenizer).pairs()
    pair = planted(tiny_lm, rows, *plants["perfect"], "perfect")
    asked = []

    def stop(vectors, seed):
        asked.append(len(vectors))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return pair.explain(vectors, seed)

    with pytest.raises(KeyboardInterrupt):
        run_suite(Work(pair._replace(explain=stop), rows, tmp_path, 0, 50, SIZES), ("health",))
    run_suite(Work(pair._replace(explain=stop), rows, tmp_path, 0, 50, SIZES), ("health",))
    assert asked == [8] * 6  # two parts, the one that was stopped, and the three that were left


def test_a_damaged_part_is_made_again(tiny_lm, rows, tmp_path, capsys):
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["perfect"], "perfect")
    first = run_suite(Work(pair, rows, tmp_path, 0, 50, SIZES), ("health",))
    (path, *_) = sorted(tmp_path.rglob("explanations/*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    assert run_suite(Work(pair, rows, tmp_path, 0, 50, SIZES), ("health",))["health"] == first["health"]
    assert "damaged; made again" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "expected"), [((), SECTIONS), (("truth", "text", "truth"), ("text", "truth"))])
def test_sections_are_chosen_by_name(names, expected):
    assert sections_of(names) == expected


def test_a_section_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--suite: 'sentences' should be one of reconstruction"):
        sections_of(["text", "sentences"])


@pytest.mark.parametrize(
    ("option", "section", "asked"),
    [
        ("--control-steps", "text", (9, False, False)),
        ("--reword", "text", (0, True, False)),
        ("--judge", "truth", (0, False, True)),
    ],
)
def test_what_adds_to_a_section_that_is_left_out_is_refused(option, section, asked):
    check_additions((section,), *asked)
    with pytest.raises(UserError, match=f"{option}: its figures belong to the section {section}"):
        check_additions([name for name in SECTIONS if name != section], *asked)


def test_sampled_rows_are_of_reconstruction_and_truth():
    for section in ("reconstruction", "truth"):
        check_additions((section, "health"), 0, False, False, 2)
    with pytest.raises(UserError, match="--sampled: its figures belong to the sections reconstruction and truth"):
        check_additions(("text", "meaning", "health"), 0, False, False, 2)
    with pytest.raises(UserError, match="--sampled: 1 should be at least 2"):
        check_additions(SECTIONS, 0, False, False, 1)


def test_rows_of_which_only_the_activation_is_known(tiny_lm, rows, tmp_path):
    """What needs the text is left out, and the rest is there."""
    bare = rows._replace(
        context_ids=[[]] * 40,
        following_ids=[[]] * 40,
        contexts=[""] * 40,
        position=np.zeros(40, int),
        domain=["text"] * 40,
    )
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["perfect"], "perfect")
    found = run_suite(Work(pair, bare, tmp_path, 0, 50, SIZES))
    assert value(found, "reconstruction", "fve") == pytest.approx(1, abs=1e-6)
    assert "meaning" not in found
    assert found["truth"]["suffix_test"]["n"] == found["truth"]["words_in_context"]["n"] == 0


@pytest.mark.parametrize("documents", [[40], [30, 10]])
def test_controls_of_other_documents_leave_out_the_own_one(tiny_lm, rows, tmp_path, capsys, documents):
    """With one document there is no such control; with a large one it is of the rows that meet another's alone."""
    few = rows._replace(document=np.repeat(np.arange(len(documents)), documents))
    pair = planted(tiny_lm, rows, *Plants(rows, tiny_lm.tokenizer).pairs()["perfect"], "perfect")
    found = run_suite(Work(pair, few, tmp_path, 0, 50, SIZES))
    meeting = 0 if len(documents) == 1 else 20
    assert capsys.readouterr().err.count("all activations are of one document") == (len(documents) == 1)
    controls = [
        (f"{section}.{key}", name, control)
        for section, figures in found.items()
        if section in SECTIONS
        for key, figure in figures.items()
        for name, control in figure.get("controls", {}).items()
        if name in ("permuted", "other", "other_notes")
    ]
    assert len(controls) > 15
    for key, name, control in controls:
        assert control["n"] <= meeting, (key, name)
        assert control["n"] or control["value"] is None, (key, name)
    assert found["reconstruction"]["fve"]["controls"]["permuted"]["n"] == meeting


def test_the_notes_before_a_continuation_do_not_end_and_hold_known_tokens(tiny_lm, tmp_path):
    """Also with a tokenizer that ends every text, and where a note spells a token without an embedding."""

    def scores(lm, notes):
        rows = SimpleNamespace(following_ids=[[3, 4, *range(5, 3 + SUFFIX)], [*range(40, 40 + SUFFIX)]])
        kept = Kept(tmp_path / str(len(notes[0])))
        work = SimpleNamespace(pair=SimpleNamespace(subject=lambda: lm), rows=rows, kept=kept)
        return _continued(work, "notes", notes, np.array([[0, 1]]))

    tokenizer = adding(f"$A {EOS[0]}")
    tokenizer.add_tokens([f"<extra{number}>" for number in range(tiny_lm.arch.vocab_size - len(tokenizer) + 1)])
    last = tokenizer.convert_ids_to_tokens(tiny_lm.arch.vocab_size)
    found = scores(LanguageModel(tiny_lm.arch, tiny_lm.params, tokenizer), [f"of{last} the"])
    np.testing.assert_allclose(found, scores(tiny_lm, ["of the"]), rtol=1e-5)
