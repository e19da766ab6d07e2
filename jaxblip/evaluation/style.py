"""The style sheet of the page, for light and dark, from the phone to the desk."""

STYLE = """
:root{--paper:#fafaf9;--sheet:#fff;--ink:#1d2125;--soft:#5f6972;--rule:#dfe2e5;--accent:#3563e9;
--right:#1a7f45;--wrong:#c52f38;--wrong-wash:#fbe3e4;--on-mark:#fff}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--sheet:#1d2125;--ink:#e8eaec;
--soft:#a3acb5;--rule:#343b42;--accent:#86a5ff;--right:#56c98a;--wrong:#ff7d80;
--wrong-wash:#4a2529;--on-mark:#10130f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);-webkit-text-size-adjust:100%;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem clamp(1rem,4vw,3rem) 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0 1rem;letter-spacing:-.015em}
h2{font-size:1.3rem;line-height:1.3;margin:2.75rem 0 .8rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 .4rem}
p{max-width:44rem;margin:.6rem 0;overflow-wrap:anywhere}
.facts{color:var(--soft);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(45%,11rem),1fr));gap:.75rem;
margin-bottom:1.25rem}
.card{background:var(--sheet);border:1px solid var(--rule);border-radius:12px;padding:.9rem 1rem}
.card b{display:block;font-size:1.8rem;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{display:block;color:var(--soft);font-size:.88rem;line-height:1.35}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:1.5rem 3rem;margin-top:1.25rem}
table{border-collapse:collapse;width:100%;max-width:40rem;font-size:.94rem;margin-bottom:1.25rem}
th,td{padding:.4rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:400;text-align:left;color:var(--soft);padding-right:1rem}
td,th[scope=col]:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
td{overflow-wrap:anywhere}
.wide td,.wide th[scope=col]:not(:first-child){padding:.4rem 0 .4rem .9rem;white-space:nowrap}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:.75rem}
figure{margin:0;background:var(--sheet);border:1px solid var(--rule);border-radius:12px;
padding:.7rem .7rem .4rem}
figcaption{display:flex;justify-content:space-between;gap:.5rem;padding:0 .3rem .3rem;
font-size:.9rem}
figcaption b{font-variant-numeric:tabular-nums}
figure svg{display:block;width:100%;height:auto;font-family:inherit}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(45%,13.5rem),1fr));
gap:.75rem}
details{margin-top:.75rem}
summary{cursor:pointer;color:var(--accent);padding:.4rem 0}
article{background:var(--sheet);border:1px solid var(--rule);border-radius:12px;
padding:.7rem;overflow-wrap:anywhere;font-size:.88rem;line-height:1.35}
article img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;
background:#fff}
.badge{display:inline-block;margin-bottom:.5rem;border-radius:1rem;padding:.1rem .6rem;
font-size:.8rem;font-weight:600;color:var(--on-mark)}
.right .badge{background:var(--right)}
.wrong .badge{background:var(--wrong)}
h4{margin:.65rem 0 .1rem;color:var(--soft);font-size:.72rem;font-weight:500;letter-spacing:.03em}
article p{margin:0;font-size:.94rem;font-weight:600}
.right p{color:var(--right)}
mark{background:var(--wrong-wash);color:var(--wrong);border-radius:3px;padding:0 .15em}
article ul{margin:0;padding:0;list-style:none;color:var(--soft)}
article li+li{margin-top:.25rem;padding-top:.25rem;border-top:1px solid var(--rule)}
li.said{color:var(--right)}
@media(max-width:30rem){article{padding:.5rem;font-size:.82rem}article p{font-size:.88rem}
h1{font-size:1.6rem}.card b{font-size:1.5rem}}
"""
