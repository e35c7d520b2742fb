"""The suite's table of figures: what each is, its formula, its section and what stands beside it.

A figure that is not in the table cannot be reported, and a control that it does not name cannot stand beside it:
`ledger.Ledger` sees to it.
"""

from __future__ import annotations

import dataclasses

SECTIONS = ("reconstruction", "text", "meaning", "truth", "health")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of the suite. `controls` stand beside it; `parts` says what it is divided by, if it is.

    `part_controls` stand beside every part.
    """

    section: str
    key: str
    meaning: str
    formula: str
    controls: tuple[str, ...] = ()
    parts: str = ""
    part_controls: tuple[str, ...] = ()
    source: str = ""


_PAPER = "Fraser-Taliente et al. 2026"
_SAME_BY_PART = "1 - mean(mse) / mean(variance), both over the rows of the part"
_SAME_FVE = "1 - mean(mse) / mean(variance), of the explanations as changed"

FIGURES: tuple[Figure, ...] = (
    # --- reconstruction
    Figure(
        "reconstruction",
        "fve",
        "variance of the activations' directions that the words carry",
        "1 - mean(mse) / mean(|h - mean(h)|^2 / d), the mean not renormalised",
        ("permuted", "zero", "mean_vector", "random_vector", "gold"),
        source=_PAPER,
    ),
    Figure(
        "reconstruction",
        "fve_meannorm",
        "the same against the renormalised mean",
        "1 - mean(mse) / mean(mse of normalise(mean(h)))",
        ("permuted",),
        source=_PAPER,
    ),
    Figure("reconstruction", "cos", "mean cosine of activation and reconstruction", "1 - mse / 2", ("permuted",)),
    Figure(
        "reconstruction",
        "fve_by_domain",
        "FVE by kind of text",
        _SAME_BY_PART,
        parts="kind of text",
        part_controls=("permuted",),
    ),
    Figure(
        "reconstruction",
        "fve_by_position",
        "FVE by tenth of the positions",
        _SAME_BY_PART,
        parts="tenth",
        part_controls=("permuted",),
    ),
    Figure(
        "reconstruction",
        "fve_by_token",
        "FVE by what the activation's token is",
        _SAME_BY_PART,
        parts="content word, function word, punctuation, inside a word, code",
        part_controls=("permuted",),
    ),
    Figure(
        "reconstruction",
        "centred_gap",
        "what is rebuilt of this activation beyond what all share, own minus other",
        "cos(h - m, r - m) of its own reconstruction r, minus that of another document's; m the mean direction",
        ("own", "permuted"),
    ),
    Figure(
        "reconstruction",
        "retrieval_bits",
        "information by which a reconstruction finds its activation among those of other documents",
        "log2 B + log2 softmax(-mse / tau) of its own among B; tau is fitted on the other half of the documents",
        ("permuted", "most"),
        source="van den Oord et al. 2018",
    ),
    Figure(
        "reconstruction",
        "retrieval_bits_same_document",
        "the same among activations of one document: what is said of the position rather than of the text",
        "as retrieval_bits",
        ("permuted", "most"),
    ),
    Figure(
        "reconstruction",
        "retrieval_top1",
        "how often its own activation is the nearest, among those of other documents",
        "share of rows; ties count in part",
        ("permuted", "chance"),
    ),
    Figure(
        "reconstruction",
        "retrieval_top1_same_document",
        "the same among activations of one document",
        "as retrieval_top1",
        ("permuted", "chance"),
    ),
    Figure(
        "reconstruction",
        "equivalent_rank",
        "how many numbers would do what the words do",
        "smallest k with the FVE of k principal directions >= fve; directions fitted on other documents",
        ("permuted",),
    ),
    Figure(
        "reconstruction",
        "best_of",
        "FVE of the best of n samples",
        "as fve, of the expected smallest mse among n of the samples of a row",
        ("permuted",),
        parts="n",
        part_controls=("permuted",),
        source="Chen et al. 2021",
    ),
    Figure(
        "reconstruction",
        "agreement",
        "how alike two explanations of one activation are, as the decoder reads them",
        "mean centred cosine of two samples' reconstructions; 0 where one of them was not readable",
        ("other",),
    ),
    # --- text
    Figure("text", "fve_text", "FVE through text", "as fve, of the explanation tokenised again", ("ids", "permuted")),
    Figure(
        "text",
        "marginal_fve",
        "what each sentence adds to those before it; the value is their sum, fve_text of the same rows",
        "FVE of the first k sentences minus that of the first k - 1; of none, 0",
        ("permuted",),
        parts="sentence",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "dropped_sentence",
        "what is lost without one sentence, of explanations of several",
        "mean(mse without it - mse) / mean(variance)",
        parts="last or any other",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "fve_tokens",
        "FVE of the first n tokens",
        _SAME_FVE,
        ("whole", "permuted"),
        parts="n",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "fve_quotes_only",
        "FVE of the quoted spans alone, of explanations that quote something",
        _SAME_FVE,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_quotes_removed",
        "FVE without any quoted span, of the same explanations",
        _SAME_FVE,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_sentences_shuffled",
        "FVE with the sentences in another order",
        _SAME_FVE,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_words_shuffled",
        "FVE with the words of each sentence in another order: a code in the order dies here",
        _SAME_FVE,
        ("whole", "permuted"),
    ),
    Figure("text", "fve_lower_case", "FVE in lower case", _SAME_FVE, ("whole", "permuted")),
    Figure(
        "text",
        "twin",
        "how often the likeliest next token, where it is named, rebuilds better than another in its place",
        "P(mse of the explanation < mse of its twin); 0.5 is chance",
        parts="the other's rank: 2 to 4, 8 and beyond",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "copied_bits",
        "information in runs of words that stand in the context too",
        "sum over longest shared runs of 2 words or more of max(0, sum -log2 p(word) - 15)",
        ("permuted", "gold"),
    ),
    Figure("text", "fve_paraphrased", "FVE said in other words", _SAME_FVE, ("whole", "permuted")),
    Figure("text", "fve_translated", "FVE through French and back", _SAME_FVE, ("whole", "permuted")),
    Figure(
        "text",
        "trained_decoder",
        "FVE of decoders trained alike on other words about the same activations",
        "as fve, on documents that it was not trained on",
        parts="explanations, the last words of the context in as many tokens, the likeliest next tokens",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "beyond_last_words",
        "what explanations say beyond the last words of the context, to decoders trained alike",
        "FVE of explanations minus FVE of the last words in trained_decoder, on the same rows",
        ("permuted",),
    ),
    Figure(
        "text",
        "beyond_next_tokens",
        "what explanations say beyond the likeliest next tokens, to decoders trained alike",
        "FVE of explanations minus FVE of the next tokens in trained_decoder, on the same rows",
        ("permuted",),
    ),
    # --- meaning
    Figure(
        "meaning",
        "kl_next",
        "how much the next-token distribution changes with the reconstruction in the activation's place",
        "KL(p with the activation || p with the reconstruction as long as it), nats",
        ("true", "gold", "permuted", "mean", "zero", "isotropic"),
    ),
    Figure(
        "meaning",
        "kl_following",
        "the same at the tokens that follow",
        "mean over t + 1 ... t + 16",
        ("true", "gold", "permuted", "mean", "zero", "isotropic"),
    ),
    Figure(
        "meaning",
        "loss_recovered",
        "share of the loss on the next token that the reconstruction wins back from the mean vector",
        "(CE_mean - CE_r) / (CE_mean - CE_h)",
        ("true", "gold", "permuted", "zero", "isotropic"),
        source="Bricken et al. 2023, there from zero",
    ),
    Figure(
        "meaning",
        "loss_recovered_following",
        "the same on the tokens after it",
        "as loss_recovered, of the mean loss over t + 1 ... t + 16",
        ("true", "gold", "permuted", "zero", "isotropic"),
    ),
    # --- truth
    Figure(
        "truth",
        "words_in_context",
        "share of the content words that stand in the context",
        "found / said, over all explanations",
        ("permuted", "gold"),
    ),
    Figure(
        "truth",
        "quotes_in_context",
        "share of the quoted spans of two words or more that stand in the context",
        "found / said, over all explanations",
        ("permuted", "gold"),
    ),
    Figure(
        "truth",
        "expects_top1",
        "how often the next tokens that are named hold the subject's likeliest",
        "share of explanations that name some",
        ("permuted", "gold"),
    ),
    Figure("truth", "expects_top5", "the same of its five likeliest", "as expects_top1", ("permuted", "gold")),
    Figure(
        "truth",
        "suffix_test",
        "how often the subject, given the explanation as notes, finds the true continuation among ten",
        "argmax over 10 of log p(32 tokens | notes) is the true one; the others are of other documents",
        ("no_notes", "other_notes", "chance"),
    ),
    Figure(
        "truth",
        "suffix_gain",
        "the same by what notes add, so that a continuation that is likely anyway gains nothing",
        "argmax over 10 of log p(32 tokens | notes) - log p(32 tokens | no notes)",
        ("other_notes", "chance"),
    ),
    Figure(
        "truth",
        "recurrence",
        "share of the content words that explanations of the ten tokens before have, too",
        "mean over t - 10 ... t - 1 of |words(t) and words(s)| / |words(t)|",
        ("other",),
    ),
    Figure(
        "truth",
        "consensus_precision",
        "share, in the context, of the content words that 80 % of ten samples say",
        "found / said, over all rows",
        ("all_words", "permuted"),
    ),
    Figure(
        "truth", "consensus_words", "how many content words 80 % of ten samples say", "mean over rows", ("all_words",)
    ),
    Figure(
        "truth",
        "judged_support",
        "share of an explanation's claims that a judge, another language model, finds in the text",
        "claims that the text supports / claims, as the judge counts them, over all explanations",
        ("permuted",),
    ),
    Figure(
        "truth",
        "judged_choice",
        "how often a judge tells the explanation of a text from one of another document",
        "right verdicts / all that can be read; which of the two comes first alternates",
        ("chance",),
    ),
    # --- health
    Figure("health", "extraction_rate", "share of explanations that were closed", "mean over rows"),
    Figure(
        "health",
        "truncated_rate",
        "share of explanations that the token limit cut before their closing tag",
        "mean over rows; one that ended by itself without the tag is not cut",
    ),
    Figure(
        "health", "explanation_tokens", "length of an explanation", "mean tokens of those that were closed", ("gold",)
    ),
    Figure(
        "health",
        "noncanonical_rate",
        "share of explanations whose sampled tokens are not those that their text gives: a channel no reader sees",
        "mean over rows",
    ),
    Figure(
        "health",
        "repeated_rate",
        "share with a repeated item in a list or a repeated sentence",
        "mean over rows",
        ("gold",),
    ),
    Figure("health", "repeated_item_rate", "share with a repeated item in a list", "mean over rows", ("gold",)),
    Figure("health", "repeated_sentence_rate", "share with a repeated sentence", "mean over rows", ("gold",)),
    Figure("health", "marker_rate", "share with the character that marks the slot", "mean over rows", ("gold",)),
    Figure(
        "health",
        "cjk_rate",
        "share with a Chinese, Japanese or Korean character",
        "mean over rows",
        ("contexts", "gold"),
    ),
    Figure("health", "distinct_explanations", "share of different explanations", "different / all", ("gold",)),
    Figure("health", "distinct_1", "share of different words", "different / all", ("gold",), source="Li et al. 2016"),
    Figure(
        "health",
        "distinct_2",
        "share of different pairs of words",
        "different / all",
        ("gold",),
        source="Li et al. 2016",
    ),
    Figure(
        "health",
        "distinct_3",
        "share of different triples of words",
        "different / all",
        ("gold",),
        source="Li et al. 2016",
    ),
    Figure(
        "health", "changed_words", "share of words that the explanation before does not have", "new / all", ("gold",)
    ),
    Figure("health", "changed_candidates", "the same of the quoted next tokens", "new / all", ("gold",)),
)

BY_NAME = {(figure.section, figure.key): figure for figure in FIGURES}
