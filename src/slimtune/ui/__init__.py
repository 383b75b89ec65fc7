"""The web page of `slimtune ui`.

It has no logic of its own: commands run as child processes, `slimtune … --json`, and the pages show their results and
what they write into run folders, with the templates of `reporting`.

    app.py        pages and forms              security.py   who may send a request, and how large it may be
    jobs.py       commands that run            workspace.py  the working folder, which nothing leaves
    settings.py   fields of the forms          templates/, static/
"""
