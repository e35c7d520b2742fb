"""English function words: they join sentences and say nothing about a text's topic."""

from __future__ import annotations

_SENTENCE_WORDS = (
    "a about above after again all also although an and any are as at be because been before being below between both "
    "but by can could did do does each either for from had has have he her here his how however i if in instead into "
    "is it its just like may might more most must my no not of on once one only or other otherwise our out over own "
    "same set she should since so some such than that the their them then there these they this those through thus to "
    "too two under until up use used using very was we were what when where whether which while who whose why will "
    "with within without would yet you your"
)
FUNCTION_WORDS = frozenset(_SENTENCE_WORDS.split())
