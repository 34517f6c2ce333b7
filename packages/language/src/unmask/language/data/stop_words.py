"""English words that say little of what a text is about: function words, collected by us for this package."""

from __future__ import annotations

_WORDS = """
    a an the this that these those each every either neither some any no none all both half few many much more
    most less least several such other others another same own enough
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her
    hers herself it its itself they them their theirs themselves one ones who whom whose which what whoever
    whatever whichever somebody someone something anybody anyone anything nobody nothing everybody everyone
    everything
    about above across after against along among amongst around as at before behind below beneath beside besides
    between beyond by despite down during except for from in inside into like near of off on onto out outside
    over past per since through throughout till to toward towards under until up upon via with within without
    and but or nor so yet if unless because although though while whereas whether than then once when whenever
    where wherever why how however
    am is are was were be been being have has had having do does did doing done can cannot could may might must
    shall should will would ought
    again already also almost always away back else even ever far further hence here there thus therefore just
    maybe never nevertheless not now often only otherwise perhaps quite rather really seldom sometimes somewhat
    soon still thereby together too very well yes
    two three four five six seven eight nine ten first second last next
    s t d m o y ll re ve ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn
    weren won wouldn
"""
STOP_WORDS = frozenset(_WORDS.split())
