"""Words around a question that do not change what is asked, in seven languages; read by `question_form` alone.

A form of address is cut off only where it stands: "how do you say please" asks about the word. All in casefolded form.
"""

from __future__ import annotations

import re


def _words(line: str) -> frozenset[str]:
    return frozenset(line.split())


CONTRACTIONS = {
    **{f"{word}'s": (word, "is") for word in ("what", "who", "where", "when", "how", "which", "there", "that", "it")},
    **{f"{word}s": (word, "is") for word in ("what", "where", "how")},
    **{f"{word}'re": (word, "are") for word in ("what", "who", "where", "you", "we", "they")},
    **{f"{word}'ve": (word, "have") for word in ("i", "you", "we", "they")},
    **{f"{word}n't": (word, "not") for word in ("do", "does", "did", "is", "are", "was", "were", "has", "have", "had")},
    **{f"{word}nt": (word, "not") for word in ("do", "does", "did", "is", "are", "was", "were", "has", "have", "had")},
    **{f"{word}n't": (word, "not") for word in ("could", "should", "would", "must", "need")},
    "can't": ("can", "not"),
    "cannot": ("can", "not"),
    "won't": ("will", "not"),
    "i'm": ("i", "am"),
    "i'd": ("i", "would"),
    "e-mail": ("email",),
    "e-mails": ("emails",),
    "weißt": ("weisst",),
}

# May stand before or behind the subject: "what is the price", "(tell me) what the price is".
MOVABLE = _words(
    "is are was were am does did has have had can could will would should must may might "
    "ist sind war waren hat haben kann können wird werden muss müssen "
    "est sont était peut es son está están puede è sono può são pode is zijn heeft hebben kan kunnen"
)

ASKING = _words(
    "what who whom whose where when which why how "
    "wer was wo wann warum wie welche welcher welches welchen welchem wem wen wessen woher wohin wieviel "
    "qui que quoi quel quelle quels quelles où quand pourquoi comment combien "
    "qué quién quiénes cuál cuáles dónde cuándo cómo cuánto cuánta cuántos cuántas "
    "quien quienes cual cuales donde cuando cuanto cuanta cuantos cuantas "
    "chi cosa quale quali qual dove quando perché come quanto quanta quanti quante "
    "quem quais onde como quantos quantas wie wat waar wanneer waarom hoe welk welke hoeveel"
)
# Spanish question words are typed without their accents as often as with them.
WITHOUT_ACCENT = {
    "cómo": "como", "qué": "que", "quién": "quien", "quiénes": "quienes", "cuál": "cual", "cuáles": "cuales",
    "dónde": "donde", "cuándo": "cuando", "cuánto": "cuanto", "cuánta": "cuanta", "cuántos": "cuantos",
    "cuántas": "cuantas",
}  # fmt: skip
BEFORE_ASKING = _words("in at on to from for by with of about under auf mit von für bei zu aus à de en da di a")

# Where spelling, wording or form itself is asked about, every character counts.
ABOUT_SPELLING = _words(
    "spell spelled spelling spelt misspelled misspelling typo typos proofread grammar grammatical punctuation "
    "translate translation correct rewrite rephrase paraphrase capitalize capitalise letters characters syllables "
    "rhyme "
    "rhymes rhyming anagram palindrome regex json xml yaml csv html sql "
    "rechtschreibung grammatik übersetze übersetzen korrigiere korrigieren buchstabiert umformulieren "
    "orthographe grammaire traduis traduire traduisez corrige corriger corrigez épeler reformule "
    "ortografía gramática traduce traducir corregir corrige deletrea reescribe "
    "grammatica traduci tradurre correggi correggere riscrivi ortografia gramática traduza traduzir corrija corrigir "
    "spelling grammatica vertaal vertalen verbeter corrigeer herschrijf"
)
# In capitals they are names: "ship to the US", "the IT team", "the WHO".
ACRONYMS = _words("us it who aids may or in is am as at me no on so to we he all can do ram sat act cat")

_POLITE = (
    "please|plz|pls|kindly|bitte|s'il vous plaît|s'il te plaît|s'il vous plait|s'il te plait|svp|stp|por favor|porfa"
    "|per favore|per piacere|alstublieft|alsjeblieft|aub"
)
_GREETING = (
    "hi|hello|hey|good (?:morning|afternoon|evening)|greetings|excuse me|dear (?:team|support)|hallo"
    "|guten (?:tag|morgen|abend)"
    "|moin|entschuldigung|entschuldigen sie|excusez-moi|pardon"
    "|scusi|scusa|perdona|disculpe|bonjour|bonsoir|salut|hola|buenos días|buenas tardes|buenas noches|buenas"
    "|ciao|salve|buongiorno|buonasera"
    "|olá|oi|bom dia|boa tarde|boa noite|hoi|goedemorgen|goedemiddag|goedenavond"
)
_TITLE = "there|team|all|everyone|everybody|support|zusammen|à tous|a todos|a tutti|allemaal"
_REMARK = (
    "(?:just )?(?:a )?quick question|i have (?:a|one) (?:quick )?question|(?:my|one) question is"
    "|(?:please )?answer (?:me )?this"
    "|(?:eine )?(?:kurze )?frage|ich habe eine frage|(?:une )?(?:petite )?question|j'ai une question|"
    "tengo una pregunta|una pregunta"
    "|ho una domanda|una domanda|tenho uma pergunta|uma pergunta|ik heb een vraag|een vraag(?:je)?"
)
# Only in front of a question word: "tell me a joke" is no wrapper.
_TELL_ME = (
    f"(?:can|could|would|will) (?:you|u|someone|anyone|somebody"
    f"|anybody) (?:(?:{_POLITE}) )?(?:possibly )?tell me(?: (?:{_POLITE}))?"
    "|i (?:would like|want|need|'d like|would love) to know|i (?:was|am) (?:just )?wondering"
    "|do you (?:happen to )?know"
    "|(?:may|can) i ask(?: you)?"
    "|(?:können|könnten|kannst|könntest) (?:sie|du|ihr) (?:mir|uns) (?:bitte )?sagen|sag mir(?: bitte)?"
    "|sagen sie mir(?: bitte)?"
    "|ich (?:möchte|will|würde) (?:gerne? )?wissen|weisst du|wissen sie|wisst ihr"
    "|(?:pouvez|pourriez)-vous me dire|(?:peux|pourrais)-tu me dire|dites-moi|dis-moi"
    "|je (?:voudrais|veux|souhaite|souhaiterais) savoir|j'aimerais savoir|savez-vous|sais-tu"
    "|(?:puedes|puede|podrías|podría|podéis) decirme|me (?:puedes|puede|podrías|podría) decir|dime|dígame"
    "|(?:quiero|quisiera|necesito|querría) saber|me gustaría saber|sabes|sabe usted"
    "|(?:puoi|può|potresti|potrebbe) dirmi|mi (?:puoi|può|potresti|potrebbe) dire|dimmi|mi dica|(?:vorrei"
    "|voglio) sapere|sai"
    "|(?:pode|poderia|podes) (?:me )?dizer(?:-me)?|me diga|diga-me|diz-me|(?:gostaria de|queria|quero) saber"
    "|você sabe"
    "|(?:kunt|kan|kun|zou) (?:u|je|jij) (?:mij|me) (?:(?:alstublieft|alsjeblieft) )?(?:vertellen|zeggen)"
    "|vertel (?:mij|me)"
    "|ik (?:wil|zou) (?:graag )?(?:willen )?weten|weet (?:u|je|jij)"
)
# "Tell me when it has arrived" asks to be told later, "tell me who ..." asks now.
_TELL_ME_NOW = "(?:please )?tell me(?: please)?"
_NOT_LATER = "|".join(sorted(ASKING - {"when", "quand", "cuándo", "quando", "wann", "wanneer"}))
_ANY_ASKING = "|".join(sorted(ASKING))
_BEFORE = "(?:(?:in|at|on|to|from|for|by|with|of|auf|mit|von|für|bei|à|de|en|da|di) )?"
LEADING = re.compile(
    rf"(?:(?P<greeting>(?:{_GREETING})(?: (?:{_TITLE}))?(?= ))|(?:{_REMARK})(?= )|(?:{_POLITE})(?= )"
    rf"|(?:can|could|would|will) you (?:please|kindly|plz|pls)(?= )"
    rf"|(?:{_TELL_ME})(?= {_BEFORE}(?:{_ANY_ASKING}) )|(?:{_TELL_ME_NOW})(?= {_BEFORE}(?:{_NOT_LATER}) )) "
)
_THANKS = (
    "thanks|thank you(?: (?:so|very) much)?|many thanks|thx|thanks in advance|thank you in advance"
    "|danke(?: schön| sehr)?"
    "|vielen dank|danke im voraus|merci(?: beaucoup| d'avance| bien)?|(?:muchas )?gracias|grazie(?: mille)?"
    "|obrigad[oa]"
    "|(?:alvast )?bedankt|dank (?:je|u)(?: wel)?"
)
TRAILING = re.compile(rf" (?:(?P<thanks>{_THANKS})|{_POLITE})$")
REQUESTING = _words(
    "i can could would my please we ich kann können könnten bitte je pouvez-vous puedo puedes "
    "puede me quiero necesito posso può puoi vorrei ik kunt kan eu pode quero preciso"
)
# Before a polite word at the end these show that the word itself is asked about.
ABOUT_WORDS = _words(
    "say says said saying mean means word words spell translate pronounce write as is or and of the a "
    "heisst sagt sagen man dit dire dice decir diz dizer zegt zeggen significa betekent bedeutet"
)
