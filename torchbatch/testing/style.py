"""The style of a report's page, light and dark."""

_LIGHT = """
--bg:#f4f6f8; --card:#ffffff; --ink:#1b1f24; --soft:#5b6470; --line:#dce1e7; --code:#f0f3f6;
--good:#15744a; --good-soft:#dff3e8; --bad:#bf2630; --bad-soft:#fde7e7; --skip:#7a5d0c; --skip-soft:#fbf1d2;
--accent:#2563c9; --accent-soft:#d8e6fb; --sheet:#c4dcf8; --shared:#e4e7ec; --shared-line:#8b94a1;
--h0:#e9edf2; --h1:#d3e4f4; --h2:#a5c9ea; --h3:#649fd6; --h4:#ffd98a; --h5:#fba54e; --h6:#e8603c; --h7:#a3122b; --h8:#5b1a86;
--ring:#111417; --ring-under:#ffffff;
"""

_DARK = """
--bg:#0f1216; --card:#171b21; --ink:#e7eaee; --soft:#a1aab6; --line:#2b323b; --code:#1f252d;
--good:#4cc38a; --good-soft:#14352a; --bad:#ff7b7f; --bad-soft:#43191d; --skip:#dcb84f; --skip-soft:#3a3013;
--accent:#78b0ff; --accent-soft:#1c3558; --sheet:#264a78; --shared:#2b313a; --shared-line:#7d8794;
--h0:#222830; --h1:#1d3450; --h2:#265083; --h3:#3a7cc4; --h4:#a87514; --h5:#e08f2c; --h6:#f4673f; --h7:#ff3f63; --h8:#c98bff;
--ring:#ffffff; --ring-under:#0b0d10;
"""

_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
code,pre,.mono{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}
h1{font-size:1.45rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.08rem;margin:36px 0 12px}
h3{font-size:1rem;margin:0 0 6px;overflow-wrap:anywhere}
p{margin:0 0 8px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:0 0 14px}
header.card{display:flex;flex-wrap:wrap;gap:14px 22px;align-items:center;border-left-width:7px;padding:20px}
header.passed{border-left-color:var(--good)} header.failed{border-left-color:var(--bad)}
header .mark{font-size:2rem;line-height:1;width:54px;height:54px;border-radius:50%;display:grid;place-items:center;
 font-weight:700}
header.passed .mark{background:var(--good-soft);color:var(--good)} header.failed .mark{background:var(--bad-soft);
 color:var(--bad)}
header .words{flex:1 1 280px;min-width:0} header .words p{margin:2px 0 0;color:var(--soft)}
.tiles{display:flex;gap:10px;flex-wrap:wrap}
.tile{min-width:84px;padding:8px 12px;border-radius:8px;background:var(--code);text-align:center}
.tile b{display:block;font-size:1.25rem;line-height:1.2} .tile small{color:var(--soft)}
.tile.bad b{color:var(--bad)} .tile.good b{color:var(--good)} .tile.skip b{color:var(--skip)}
.flow{display:flex;flex-direction:column;gap:14px}
.step{display:flex;gap:14px;align-items:center}
.arrays{display:flex;flex-wrap:wrap;gap:16px 26px;align-items:flex-start;min-width:0}
.array{display:flex;flex-direction:column;gap:2px} .array .dtype{color:var(--soft)}
.function{padding:12px 16px;border:1.5px solid var(--ink);border-radius:8px;min-width:0;overflow-wrap:anywhere}
.arrow{font-size:1.6rem;color:var(--soft)}
.picture{display:flex;flex-direction:column;gap:6px;align-items:flex-start}
svg text{fill:var(--soft);font:12px system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif;text-anchor:middle}
svg text.end{text-anchor:end} svg text.inside{fill:var(--ink)}
svg text.batch-label{fill:var(--accent);font-weight:700;text-anchor:start;font-size:13px}
svg rect.sample{fill:var(--sheet);stroke:var(--accent);stroke-width:1.4}
svg rect.shared{fill:var(--shared);stroke:var(--shared-line);stroke-width:1.4}
svg rect.none{fill:none;stroke:var(--accent);stroke-width:1.4;stroke-dasharray:4 3}
.chips{display:flex;gap:4px;flex-wrap:wrap}
.chip{display:flex;flex-direction:column;align-items:center;min-width:46px;padding:2px 8px;border:1.5px solid var(--line);
 border-radius:6px;line-height:1.25}
.chip small{color:var(--soft);font-size:11px} .chip.plain{color:var(--soft)}
.chip.batch{background:var(--accent-soft);border-color:var(--accent)} .chip.batch b,.chip.batch small{color:var(--accent)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:6px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:600;border-bottom-width:2px;white-space:nowrap} thead small{display:block;
 font-weight:400}
tbody th{font-weight:500} .glance th{white-space:nowrap} tr.group th{color:var(--soft);font-weight:600;padding-top:14px}
.checks td:nth-child(-n+4){white-space:nowrap}
tr.failed-row td:first-child{box-shadow:inset 3px 0 0 var(--bad)}
td.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.passed-mark,.failed-mark,.skipped-mark{white-space:nowrap;font-weight:600;border-radius:6px;padding:1px 8px;
 display:inline-block;
 text-decoration:none}
.passed-mark{color:var(--good);background:var(--good-soft)} .failed-mark{color:var(--bad);background:var(--bad-soft)}
.skipped-mark{color:var(--skip);background:var(--skip-soft)} a.failed-mark:hover{text-decoration:underline}
.failure{border-left:5px solid var(--bad)} .failure .target{scroll-margin-top:70px} .failure .kind{color:var(--bad);
 font-weight:600}
pre{margin:8px 0;padding:12px 14px;background:var(--code);border-radius:8px;overflow-x:auto;white-space:pre-wrap;
 overflow-wrap:anywhere}
.leaf{border-top:1px solid var(--line);margin-top:12px;padding-top:12px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(185px,1fr));gap:8px 18px;margin:8px 0 12px}
.facts div{min-width:0;overflow-wrap:anywhere} .facts dt{color:var(--soft);font-size:.82rem} .facts dd{margin:0}
.heat{max-width:100%;height:auto;display:block}
.ring,.ring-under{fill:none;stroke:var(--ring);stroke-width:2} .ring-under{stroke:var(--ring-under);stroke-width:4}
.heat .h0{fill:var(--h0)} .heat .h1{fill:var(--h1)} .heat .h2{fill:var(--h2)} .heat .h3{fill:var(--h3)}
 .heat .h4{fill:var(--h4)}
.heat .h5{fill:var(--h5)} .heat .h6{fill:var(--h6)} .heat .h7{fill:var(--h7)} .heat .h8{fill:var(--h8)}
.legend{display:flex;flex-wrap:wrap;gap:4px 12px;margin:6px 0 10px;color:var(--soft);font-size:.84rem}
.legend span{display:inline-flex;align-items:center;gap:5px} .legend i{width:15px;height:15px;border-radius:3px;
 display:inline-block}
.legend .h0{background:var(--h0)} .legend .h1{background:var(--h1)} .legend .h2{background:var(--h2)}
.legend .h3{background:var(--h3)} .legend .h4{background:var(--h4)} .legend .h5{background:var(--h5)}
.legend .h6{background:var(--h6)} .legend .h7{background:var(--h7)} .legend .h8{background:var(--h8)}
.legend .ring-mark{border:2px solid var(--ring);border-radius:50%}
.blame{display:flex;gap:10px;align-items:center;margin:4px 0;flex-wrap:wrap} .blame .who{min-width:70px;font-weight:600}
.blame .bar{position:relative;flex:0 1 280px;min-width:140px;height:12px;background:var(--h0);border-radius:6px}
.blame .bar i{position:absolute;left:0;top:0;bottom:0;border-radius:6px} .blame .within{background:var(--h3)}
.blame .beyond{background:var(--h6)} .blame .bar .one{left:40%;width:2px;top:-3px;bottom:-3px;background:var(--ink);
 border-radius:0}
.blame .amount{color:var(--soft)}
details{margin:0} summary{cursor:pointer;font-weight:600} details[open] summary{margin-bottom:10px}
.warnings li{margin:3px 0} ul{margin:0;padding-left:20px}
.settings{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:6px 26px}
.quiet{color:var(--soft)} footer{margin-top:34px;color:var(--soft);font-size:.85rem}
@media (max-width:560px){main{padding:16px 10px 40px} .card{padding:12px}}
@media print{body{background:none} .card{break-inside:avoid}}
"""

#: The whole style sheet. Nothing in it is fetched from anywhere.
STYLE = f":root{{color-scheme:light dark;{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n{_PAGE}"
