"""The web page of `slimtune ui`.

It has no logic of its own: commands run as child processes, `slimtune … --json`, and the pages show their results and
what they write into run folders, with the templates of `reporting`.

    app.py        addresses and their pages    security.py    who may send a request, and how large it may be
    pages.py      what pages and forms do      workspace.py   the working folder, which nothing leaves
    settings.py   fields of the forms          jobs.py        commands that run
    runs.py       what runs are doing, and what is shown of them
    chat.py       the conversation             chat_worker.py the process with its model
    server.py     socket and uvicorn           templates/, static/ (with htmx, Zero-Clause BSD)
"""
