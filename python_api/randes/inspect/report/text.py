"""A report's words and its style."""

WORDS = {
    "sizes": """<p>The <b>base</b> is stored once. All deltas together are in the <b>superposed</b> buffers, one a
group of models, however many models share it. <b>Kept per model</b> is what each model has of its own, exactly.
A <b>basis</b> is there with <code>rank</code> alone. The packed sizes are computed from shapes, for
<code>randes pack</code> with groups of 64 columns, or those of this store, and coordinates in as many bits as
the buffers, 4 at least; nothing was packed for this page.</p>""",
    "models": """<p>Models of one group share a buffer, and interfere with each other alone. <b>α</b> scales a
model's deltas when it is used; <b>tuned α</b> counts the tensors that have their own. <b>‖δ‖</b> is the size of
its deltas in the superposed tensors. The errors are explained under Interference.</p>""",
    "interference": """<p>What comes back of a model's weights is the model plus the deltas of its J−1 neighbours,
turned into noise. Relative to what is superposed of its own delta that noise is about <b>√(J−1)</b>. The
<b>predicted</b> error is ‖Ŵ − W‖ / ‖W − W0‖ computed from that, with what packing and α add; it is less in
tensors that fewer models changed, and where a part of the delta is in a shared basis. <b>Measured</b> is the same of
checkpoints that were given, as <code>randes verify</code> has it. <b>Neither is the accuracy</b>: noise that
points in all directions evenly cancels inside a layer, and a model with an error of 2.6 in its weights can
answer almost as the original does. Lower is better between two stores of the same transform; between transforms
this number says nothing. Evaluate the model.</p>""",
    "storage": """<p>Under the names of FusionBench's metadata, gigabytes in 10⁹ bytes. Here a model's context is one
gain a tensor, because its signs are made again from names. FusionBench counts contexts as if they were stored, and of
task arithmetic nothing of what is not superposed.</p>""",
    "retrieval": """<p>Each checkpoint beside what comes back of it. <b>Weights</b>: of all of its tensors.
<b>Deltas</b>: Ŵ − W0 and W − W0 over the superposed tensors; with J models in a group their cosine is about 1 / √J.
<b>Thirds</b>: of the singular directions of each delta, loudest first, the cosine of the delta with what comes back of
it in these directions; a mean over at most 12 matrices, and of their 96 loudest directions. Likeness of weights is
not the accuracy.</p>""",
    "originals": """<p>Cosines of the deltas of the <b>checkpoints that were given</b>, over all superposed tensors
as one vector. <b>Before</b>: as they are, measured from the store's base. <b>After</b>: each turned by its
model's signs and permutations, as it lies in the shared buffer (without what its model keeps in a shared
basis). Transforms keep every delta's size and make them all but orthogonal: what is left should be near zero,
about 1/√(number of elements). Both pictures have one scale; lines part groups. With <code>signs="none"</code>
they are the same, and deltas that point the same way then do not cancel.</p>""",
    "retrieved": """<p>Fewer than two checkpoints were given, so the original deltas are not known here. These are
cosines of the <b>retrieved deltas</b>: what comes back of each model from the store, its own delta with all of
its neighbours' as noise. They are <b>not</b> the cosines of the original deltas: in a group of J models, with
signs, they are smaller by a factor of about J/2 (J with a permutation), and only clear differences from zero
mean anything. For the originals, before and after their transforms, give two checkpoints or more: <code>--model
NAME=PATH</code>.</p>""",
    "no cosines": "<p>There are fewer than two models.</p>",
    "title before": "Before: deltas of the checkpoints",
    "title after": "After: the same deltas as they lie in the shared buffer",
    "title retrieved": "Retrieved deltas",
    "energy": """<p>Where each model's superposed delta is: gain² times elements, ‖δ‖² of a layer's superposed
tensors (without what is kept in a shared basis). A layer is all that comes before, and with, the first number
of a tensor's name. An empty place is a layer that the model did not change. Gains bring all deltas to one size
before they are summed, so a model with a small energy comes back as well as one with a large one.</p>""",
    "superposed": "<p>Matrices whose deltas share buffers. <code>*</code> stands for numbers in names.</p>",
    "kept": """<p><b>Kept per model</b>: models that changed it have their own, bit for bit. <b>Shared with the
base</b>: no model changed it, or <code>others="base"</code> gave it up. <b>Averaged</b>: one mean serves all
(<code>others="average"</code>). <b>Summed</b>: the base's, and the sum of all deltas (<code>"sum"</code>).
"Bytes a model" is what one whole copy takes.</p>""",
    "reading": """<h2>What this page does not say</h2><ul>
<li><b>How well a model answers.</b> Weight error, cosines and energies are of weights. Evaluate each model on its own
task, as retrieved or as served, beside its original.</li>
<li><b>How fast it is served</b>, or how much memory serving takes: sizes are those of the store's tensors. A server
holds integers in its own dtype.</li>
<li><b>Which models belong in one group.</b> Fewer models in a group keep more of each and store more:
<code>group_size</code> is the dial, and your evaluation reads it.</li></ul>""",
}

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --quiet: #5b6675; --back: #ffffff;
 --line: #d8dde4; --band: #f4f6f9; }
@media (prefers-color-scheme: dark) {
 :root { --text: #e4e8ee; --quiet: #9aa6b5; --back: #14181f; --line: #333c48; --band: #1c222b; } }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
p, li { max-width: 46rem; } .lead { font-size: 1.1rem; } .note { color: var(--quiet); font-size: .9rem; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; overflow: visible; color: var(--text); }
figcaption { color: var(--quiet); font-size: .85rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2rem; } .pair > div { flex: 1 1 28rem; min-width: 0; }
.wide { overflow-x: auto; margin: 1rem 0; max-height: 40rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: 600; } td.n { text-align: right; white-space: nowrap; }
th, td { overflow-wrap: break-word; max-width: 24rem; }
td:first-child { min-width: 8rem; } tr:hover td { background: var(--band); }
summary { cursor: pointer; color: var(--quiet); } code { font-size: .9em; background: var(--band); padding: 0 .2em; }
"""
