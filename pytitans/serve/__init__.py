"""`titans serve`: a local server with OpenAI's endpoints and memory sessions.

    settings    what may be chosen, and the limits
    generation  a prompt read and continued, one small step at a time
    text        ids to text as it arrives, stop strings, chat prompts
    engine      one thread that gives every request a step in turn
    storage     caches as files, and how much of the disk each client fills
    sessions    memories with a name, in memory and on disk
    service     a request from admission to commit: limits, locks, metrics
    guard       who may talk to the server, and how much
    completions, memory_routes, app    the HTTP side
    command     the command line

See docs/serving.md. Nothing here is imported before a server starts.
"""
