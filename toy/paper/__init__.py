"""The paper in small: its claims, each asked again of small models on two cores (docs/paper.md has what came out).

    python -m toy.paper rank --quick              # a minute: it shows that it runs, and its figures are no results
    python -m toy.paper rank                      # hours; may be stopped, and goes on
    python -m toy.paper page                      # the page and its figures, from the JSON file of each run

The experiments, and what each needs besides `pip install -e ".[train]"`:

    rank          Figures 5 and 6 and Table 1: ranks from 0 to D, and a random subspace
    directions    what was trained for rank, its losses inside and outside of the subspace
    embedding     with another start of the patch embedding than the subspace gives
    switch        ranks 32 and 8, in one drawing
    renew         what was trained for embedding, drawn with new noise in each step
    guidance      what was trained for rank, drawn with more and less guidance
    speed         the same, drawn after each quarter of the training
    repa          Table 2: with alignment; after rank; ".[repa]"
    rate          the search for learning rates
    own-rate      rank again, each with its own rate; after rate
    narrow        held-out losses of half the width
    emoji         the same on emoji, at both widths; --data emoji64.tar (docs/emoji64.md)
    finetuning    Table 3 and Figure 4: from latents to pixels; ".[flux2]"
    predict       the best rank, predicted from spectra; --data emoji64.tar
    all           the prediction, all experiments one after the other, and the page; --data emoji64.tar
"""
