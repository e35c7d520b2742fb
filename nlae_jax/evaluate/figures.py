"""The table of the suite's figures: what each figure means, its formula, its section, its controls and its parts.

`ledger.Ledger` accepts only figures and controls that are in this table.
"""

from __future__ import annotations

import dataclasses

SECTIONS = ("reconstruction", "text", "meaning", "truth", "health")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of the suite, in `section` under `key`.

    `meaning` says in words what the figure measures. `formula` defines it; `docs/evaluation.md` explains the symbols.
    `controls` are the names of the controls that stand beside it. If the figure is also measured on parts, `parts` says
    what the parts are, and `part_controls` are the controls beside each part. `source` is the paper that defines the
    figure, '' if it is defined here.
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
_FVE_OF_PART = "1 - mean(mse) / mean(variance), both over the rows of the part"
_FVE_OF_CHANGED = "1 - mean(mse) / mean(variance), with the mse of the changed explanations"

FIGURES: tuple[Figure, ...] = (
    # --- reconstruction
    Figure(
        "reconstruction",
        "fve",
        "share of the variance of the activations' directions that explanations carry",
        "1 - mean(mse) / mean(|u(h) - mean(u(h))|^2 / d); the mean is not renormalised",
        ("permuted", "zero", "mean_vector", "random_vector", "gold"),
        source=_PAPER,
    ),
    Figure(
        "reconstruction",
        "fve_meannorm",
        "FVE by the other definition, against the renormalised mean; never lower than fve",
        "1 - mean(mse) / mean(mse(mean(u(h)), h))",
        ("permuted",),
        source=_PAPER,
    ),
    Figure(
        "reconstruction",
        "cos",
        "mean cosine of activations and their reconstructions",
        "mean(1 - mse / 2)",
        ("permuted",),
    ),
    Figure(
        "reconstruction",
        "fve_by_domain",
        "FVE by kind of text",
        _FVE_OF_PART,
        parts="kind of text",
        part_controls=("permuted",),
    ),
    Figure(
        "reconstruction",
        "fve_by_position",
        "FVE by the activation's position in the text",
        _FVE_OF_PART,
        parts="tenth of the positions",
        part_controls=("permuted",),
    ),
    Figure(
        "reconstruction",
        "fve_by_token",
        "FVE by the class of the activation's token",
        _FVE_OF_PART,
        parts="content word, function word, punctuation, inside a word, code",
        part_controls=("permuted",),
    ),
    Figure(
        "reconstruction",
        "centred_gap",
        "how much better its own reconstruction fits an activation than another document's, beyond the mean direction",
        "mean of cos(u(h) - m, u(r) - m) - cos(u(h) - m, u(s) - m); s is another document's reconstruction",
        ("own", "permuted"),
    ),
    Figure(
        "reconstruction",
        "retrieval_bits",
        "information in bits by which a reconstruction identifies its activation among those of other documents",
        "mean of log2 B + log2 softmax(-mse / tau) at its own activation, among B; tau is fitted on other documents",
        ("permuted", "most"),
        source="van den Oord et al. 2018",
    ),
    Figure(
        "reconstruction",
        "retrieval_bits_same_document",
        "information in bits by which a reconstruction identifies its activation among those of the same document",
        "as retrieval_bits, among activations of the same document",
        ("permuted", "most"),
    ),
    Figure(
        "reconstruction",
        "retrieval_top1",
        "how often its own activation is the nearest to a reconstruction, among activations of other documents",
        "share of rows; if k activations are equally near, the row counts 1/k",
        ("permuted", "chance"),
    ),
    Figure(
        "reconstruction",
        "retrieval_top1_same_document",
        "how often its own activation is the nearest to a reconstruction, among activations of the same document",
        "as retrieval_top1, among activations of the same document",
        ("permuted", "chance"),
    ),
    Figure(
        "reconstruction",
        "equivalent_rank",
        "how many principal directions reach the FVE of the explanations",
        "smallest k with FVE of the first k principal directions >= fve; directions fitted on other documents",
        ("permuted",),
    ),
    Figure(
        "reconstruction",
        "best_of",
        "FVE of the best of n sampled explanations",
        "as fve, with the expected smallest mse among n samples of each row",
        ("permuted",),
        parts="n",
        part_controls=("permuted",),
        source="Chen et al. 2021",
    ),
    Figure(
        "reconstruction",
        "agreement",
        "how similar the reconstructions from two explanations of one activation are",
        "mean of cos(u(r1) - m, u(r2) - m) over pairs of samples; 0 if one of them is unreadable",
        ("other",),
    ),
    # --- text
    Figure(
        "text",
        "fve_text",
        "FVE through text: the explanation is decoded to text and tokenised again",
        "as fve, from the tokens of the text",
        ("ids", "permuted"),
    ),
    Figure(
        "text",
        "marginal_fve",
        "FVE that each sentence adds to the sentences before it; the value is the sum, fve_text of the same rows",
        "FVE of the first k sentences - FVE of the first k - 1 sentences; without a sentence FVE is 0",
        ("permuted",),
        parts="sentence",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "dropped_sentence",
        "FVE that is lost without one sentence, for explanations of several sentences",
        "mean(mse without the sentence - mse) / mean(variance)",
        parts="which sentence: the last, or another",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "fve_tokens",
        "FVE of the first n tokens of an explanation",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
        parts="n",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "fve_quotes_only",
        "FVE of the quoted spans without the rest, for explanations that quote something",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_quotes_removed",
        "FVE of the text without its quoted spans, for explanations that quote something",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_sentences_shuffled",
        "FVE with the sentences in another order",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_words_shuffled",
        "FVE with the words of each sentence in another order, which destroys a code in the order of words",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
    ),
    Figure("text", "fve_lower_case", "FVE of explanations in lower case", _FVE_OF_CHANGED, ("whole", "permuted")),
    Figure(
        "text",
        "twin",
        "how often an explanation that names the likeliest next token beats its twin, which names another token",
        "P(mse of the explanation < mse of its twin); a tie counts 0.5, which is chance",
        parts="rank of the other token: 2 to 4, 8 and beyond",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "copied_bits",
        "information in runs of words that also occur in the context, in bits",
        "mean of the sum over longest shared runs of 2 words or more of max(0, sum of -log2 p(word) - 15)",
        ("permuted", "gold"),
    ),
    Figure(
        "text",
        "fve_paraphrased",
        "FVE of explanations that another language model has paraphrased",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "fve_translated",
        "FVE of explanations that another language model has translated into French and back",
        _FVE_OF_CHANGED,
        ("whole", "permuted"),
    ),
    Figure(
        "text",
        "trained_decoder",
        "FVE of decoders that are trained alike on different texts about the same activations",
        "as fve, on documents that the decoder was not trained on",
        parts="explanations, the last words of the context in as many tokens, the likeliest next tokens",
        part_controls=("permuted",),
    ),
    Figure(
        "text",
        "beyond_last_words",
        "how much more explanations carry than the last words of the context, for decoders that are trained alike",
        "FVE of explanations - FVE of the last words, both of trained_decoder, on the same rows",
        ("permuted",),
    ),
    Figure(
        "text",
        "beyond_next_tokens",
        "how much more explanations carry than the likeliest next tokens, for decoders that are trained alike",
        "FVE of explanations - FVE of the next tokens, both of trained_decoder, on the same rows",
        ("permuted",),
    ),
    # --- meaning
    Figure(
        "meaning",
        "kl_next",
        "how much the subject's next-token prediction changes if the reconstruction takes the activation's place",
        "mean of KL(p with h || p with r, scaled to the norm of h), in nats",
        ("true", "gold", "permuted", "mean", "zero", "isotropic"),
    ),
    Figure(
        "meaning",
        "kl_following",
        "how much the predictions at the following tokens change if the reconstruction takes the activation's place",
        "as kl_next, averaged over the predictions at t + 1 ... t + 16",
        ("true", "gold", "permuted", "mean", "zero", "isotropic"),
    ),
    Figure(
        "meaning",
        "loss_recovered",
        "share of the loss on the next token that the reconstruction wins back, compared with the mean vector",
        "(CE_mean - CE_r) / (CE_mean - CE_h); CE_v is the mean loss with v in the activation's place",
        ("true", "gold", "permuted", "zero", "isotropic"),
        source="Bricken et al. 2023, with zero for the mean vector",
    ),
    Figure(
        "meaning",
        "loss_recovered_following",
        "share of the loss at the following tokens that the reconstruction wins back, compared with the mean vector",
        "as loss_recovered, with the losses of the predictions at t + 1 ... t + 16",
        ("true", "gold", "permuted", "zero", "isotropic"),
    ),
    # --- truth
    Figure(
        "truth",
        "words_in_context",
        "share of the content words that occur in the context",
        "words found / words, summed over all explanations",
        ("permuted", "gold"),
    ),
    Figure(
        "truth",
        "quotes_in_context",
        "share of the quoted spans that occur in the context, without single words in the sentence of next tokens",
        "spans found / spans, summed over all explanations",
        ("permuted", "gold"),
    ),
    Figure(
        "truth",
        "expects_top1",
        "how often the named next tokens include the subject's likeliest next token",
        "share of the explanations that name next tokens",
        ("permuted", "gold"),
    ),
    Figure(
        "truth",
        "expects_top5",
        "how often the named next tokens include one of the subject's five likeliest next tokens",
        "share of the explanations that name next tokens",
        ("permuted", "gold"),
    ),
    Figure(
        "truth",
        "suffix_test",
        "how often the subject, which reads the explanation as notes, finds the true continuation among ten",
        "share of rows where log p(32 tokens | notes) is highest for the true one; nine are of other documents",
        ("no_notes", "other_notes", "chance"),
    ),
    Figure(
        "truth",
        "suffix_gain",
        "how often the explanation as notes raises the log-probability of the true continuation most, among ten",
        "share of rows where log p(32 tokens | notes) - log p(32 tokens | no notes) is highest for the true one",
        ("other_notes", "chance"),
    ),
    Figure(
        "truth",
        "recurrence",
        "share of the content words that also occur in the explanations of the ten tokens before",
        "mean over s = t - 10 ... t - 1 of |words(t) and words(s)| / |words(t)|",
        ("other",),
    ),
    Figure(
        "truth",
        "consensus_precision",
        "of the content words that occur in at least 80 % of ten samples, the share that occurs in the context",
        "words found / words, summed over all rows",
        ("all_words", "permuted"),
    ),
    Figure(
        "truth",
        "consensus_words",
        "number of content words that occur in at least 80 % of ten samples",
        "mean over rows",
        ("all_words",),
    ),
    Figure(
        "truth",
        "judged_support",
        "share of an explanation's claims that a judge, another language model, finds supported by the text",
        "supported claims / claims, as the judge counts them, summed over all explanations",
        ("permuted",),
    ),
    Figure(
        "truth",
        "judged_choice",
        "how often a judge tells the explanation of a text from the explanation of another document",
        "right verdicts / readable verdicts; the order of the two explanations alternates",
        ("chance",),
    ),
    # --- health
    Figure(
        "health",
        "extraction_rate",
        "share of readable explanations, which have a closing tag and text before it",
        "mean over rows",
    ),
    Figure(
        "health",
        "truncated_rate",
        "share of explanations that the token limit cut before their closing tag",
        "mean over rows; an explanation that ends before the limit without the tag is not cut",
    ),
    Figure(
        "health",
        "explanation_tokens",
        "number of tokens in an explanation",
        "mean over the readable explanations",
        ("gold",),
    ),
    Figure(
        "health",
        "noncanonical_rate",
        "share of explanations whose sampled tokens differ from the tokens of their text, where a code could hide",
        "mean over rows",
    ),
    Figure(
        "health",
        "repeated_rate",
        "share of explanations that repeat an item of a list or a sentence",
        "mean over rows",
        ("gold",),
    ),
    Figure(
        "health",
        "repeated_item_rate",
        "share of explanations that repeat an item of a list",
        "mean over rows",
        ("gold",),
    ),
    Figure(
        "health", "repeated_sentence_rate", "share of explanations that repeat a sentence", "mean over rows", ("gold",)
    ),
    Figure(
        "health",
        "marker_rate",
        "share of explanations that contain the character that marks the slot",
        "mean over rows",
        ("gold",),
    ),
    Figure(
        "health",
        "cjk_rate",
        "share of explanations that contain a Chinese, Japanese or Korean character",
        "mean over rows",
        ("contexts", "gold"),
    ),
    Figure(
        "health",
        "distinct_explanations",
        "share of different explanations",
        "different explanations / explanations",
        ("gold",),
    ),
    Figure(
        "health",
        "distinct_1",
        "share of different words",
        "different words / words",
        ("gold",),
        source="Li et al. 2016",
    ),
    Figure(
        "health",
        "distinct_2",
        "share of different pairs of neighbouring words",
        "different pairs / pairs",
        ("gold",),
        source="Li et al. 2016",
    ),
    Figure(
        "health",
        "distinct_3",
        "share of different triples of neighbouring words",
        "different triples / triples",
        ("gold",),
        source="Li et al. 2016",
    ),
    Figure(
        "health",
        "changed_words",
        "share of words that are not in the explanation before",
        "new words / words",
        ("gold",),
    ),
    Figure(
        "health",
        "changed_candidates",
        "share of named next tokens that the explanation before does not name",
        "new tokens / tokens",
        ("gold",),
    ),
)

BY_NAME = {(figure.section, figure.key): figure for figure in FIGURES}
