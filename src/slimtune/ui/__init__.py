"""The web page of `slimtune ui`.

It has no logic of its own: commands run as child processes, `slimtune … --json`, and the pages show their results and
what they write into run folders, with the templates of `reporting`.

    web_app.py         addresses and their pages      request_security.py   who may send a request
    pages.py           what pages and forms do        workspace.py          the working folder, which nothing leaves
    form_fields.py     fields of the forms            command_arguments.py  what the forms choose, as arguments
    column_choices.py  columns of the chosen rows     command_jobs.py       commands that run
    field_names.py     messages in the page's words
    run_pages.py       what runs are doing, and what is shown of them
    chat_session.py    the conversation with a run, whose model is in a process of its own (generation/chat_worker.py)
    web_server.py      socket and uvicorn             templates/, static/ (with htmx, Zero-Clause BSD)
"""
