"""What a server is like for those who ask it: `kvray bench serve`.

workload  what is asked: sessions of turns          synthetic, agents, from_trace   where such sessions come from
bodies    a turn as the body of a request           answers   events of an answer, folded into an Outcome
sending   asks over HTTP, within deadlines          playing   asks sessions at their times
figures   statistics of outcomes: pure              running   repeats, of one server or of two in turn
report    JSON, tables                              plots     SVG, by matplotlib
tables    figures of repeats, spread and ratios     bare/     the engine alone: `kvray bench engine`
"""
