"""Load for an OpenAI-compatible server, and what it was like for those who asked: `kvray bench serve`.

load      what is asked: sessions of turns               synthetic, agents, from_trace   where such sessions come from
bodies    a turn as the body of a request                answers    events of an answer, folded into an Outcome
sending   asks over HTTP, within deadlines               playing    asks sessions at their times
figures   statistics of outcomes: pure                   running    repeats, of one server or of two in turn
report    JSON, tables                                   plots      SVG, by matplotlib
"""
