"""How the page looks: on light and dark screens, on phones, on paper."""

# Series colours are those of Okabe and Ito, which colour-blind readers can tell apart; on dark
# paper they are lighter. Charts use them as var(--c1) … var(--c4).
CSS = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d2126;--soft:#5b646e;
--line:#dfe2e5;--band:#eef1f4;--c1:#0065a3;--c2:#c2540a;--c3:#007a58;--c4:#a8518a;
--good:#00694b;--warn:#8a5300;--bad:#b3261e;--gap:1.25rem}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1c2024;--ink:#e8eaed;--soft:#a3adb8;
--line:#353b42;--band:#262b31;--c1:#5fb4ea;--c2:#f09a52;--c3:#35c79a;--c4:#e096c6;
--good:#4fd0a5;--warn:#f0b356;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:clamp(1rem,4vw,2.5rem)}
h1{font-size:clamp(1.5rem,5vw,2.1rem);line-height:1.2;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.4rem 0}.eyebrow{color:var(--soft);font-size:.9rem;margin:0}
.lead,.missing,figcaption,.note{color:var(--soft);max-width:44rem}
.missing{border-left:3px solid var(--line);padding-left:.8rem}
.verdict{background:var(--card);border:1px solid var(--line);border-left:6px solid var(--soft);
border-radius:6px;padding:1rem 1.2rem;margin:1rem 0}
.verdict.good{border-left-color:var(--good)}.verdict.warn{border-left-color:var(--warn)}
.verdict.bad{border-left-color:var(--bad)}
.verdict strong{font-size:1.15rem}.good strong{color:var(--good)}.warn strong{color:var(--warn)}
.bad strong{color:var(--bad)}
.verdict ul{margin:.4rem 0 0;padding-left:1.1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(13rem,45%),1fr));gap:.7rem;
margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem}
.tile b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));
gap:var(--gap);margin-top:1rem}
figure{margin:0;min-width:0;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:.7rem .8rem .3rem;break-inside:avoid}
figure.wide{grid-column:1/-1}figcaption{font-size:.9rem;color:var(--ink);margin-bottom:.2rem}
figure svg{display:block;width:100%;height:auto}
figure.wide{overflow-x:auto}figure.wide svg{min-width:40rem}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif!important}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th,td{padding:.32rem .7rem .32rem 0;border-bottom:1px solid var(--line);text-align:right}
td{white-space:nowrap}
.words1 :is(th,td):nth-child(-n+1),.words2 :is(th,td):nth-child(-n+2),
.words3 :is(th,td):nth-child(-n+3),.words4 :is(th,td):nth-child(-n+4)
{text-align:left;white-space:normal;overflow-wrap:break-word;min-width:5rem;max-width:30rem}
:is(th,td):last-child{padding-right:0}
.bars{display:grid;grid-template-columns:minmax(5rem,auto) 1fr auto;gap:.25rem .9rem;
align-items:center}
.bars .name{text-align:right;font-size:.92rem}
.bars .track{position:relative;height:1.35rem;background:var(--band);border-radius:3px}
.bars .fill{height:100%;border-radius:3px;background:var(--c1)}
.bars .fill.untrained{background:none;border:2px solid var(--c2)}
.bars .value{font-size:.92rem;text-align:right;font-variant-numeric:tabular-nums}
.bars .chance{position:absolute;top:-3px;bottom:-3px;width:0;border-left:2px dotted var(--ink)}
.bars h3{grid-column:1/-1}
.ledger{display:flex;height:1.6rem;border-radius:4px;overflow:hidden;gap:2px;margin:.6rem 0}
.ledger i,.swatch{background:var(--fill)}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.5em}
.maps{display:grid;grid-template-columns:auto 1fr;gap:.3rem .8rem;align-items:center;margin:1rem 0}
.maps .name{font-size:.85rem;color:var(--soft);text-align:right}
.maps .key{grid-column:1/-1;font-size:.9rem;overflow-wrap:anywhere}
.maps img{display:block;width:100%;max-width:48rem;border-radius:3px}
details{margin:.8rem 0}summary{cursor:pointer}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.8rem;
overflow-x:auto;font-size:.82rem;line-height:1.45}
code{background:var(--band);border-radius:3px;padding:.1em .35em;overflow-wrap:anywhere}
pre code{background:none;padding:0}
footer{color:var(--soft);font-size:.85rem;margin-top:3rem;border-top:1px solid var(--line);
padding-top:.8rem}
@media(max-width:32rem){.maps{grid-template-columns:1fr}.bars{grid-template-columns:1fr auto}
.bars .name{grid-column:1/-1}.bars .name,.maps .name{text-align:left}}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--band:#eee;
--c1:#0065a3;--c2:#c2540a;--c3:#007a58;--c4:#a8518a;--good:#00694b;--warn:#8a5300;--bad:#b3261e}
main{max-width:none;padding:0}body{font-size:10pt}
.figures{grid-template-columns:1fr 1fr}figure.wide svg{min-width:0}
table{font-size:8pt}th,td{padding-right:.4rem}.maps,.verdict,.tile{break-inside:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}h2{break-after:avoid}}
"""
