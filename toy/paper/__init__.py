"""The paper in small: its claims, each asked again of small models on two cores (docs/paper.md has what came out).

python -m toy.paper rank --quick     # a minute: it shows that it runs, and its figures are no results
python -m toy.paper rank             # hours; may be stopped, and goes on
python -m toy.paper page             # docs/paper.md and its figures, from the JSON file of each run
"""
