"""What one looks at in a run: its figure training.png, its page report.html, and the examples that are printed.

curves.py     the axes of the metrics, and the panels of figure and page
samples.py    graded responses read back from samples/, and those that are chosen to be shown
contents.py   what a page shows of one run, read from the run's folder
page.py       one self-contained HTML file: page.html, page.css, the scripts (*.js) and the contents
"""
