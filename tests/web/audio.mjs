// What tests/web/test_keywords_page.py runs in Node; it prints one JSON line.
//
//   node audio.mjs features FOLDER        cases.json through examples/keywords/web/audio.js
//   node audio.mjs drive ADDRESS CHROMIUM USER [FOLDER]
//                                          the page in a browser; screenshots with USER in FOLDER

import { readFileSync } from "node:fs";
import { join } from "node:path";

const [, , command, where, chromium, user, images] = process.argv;

async function features() {
  const { readWav, resample, audioPreprocessor } = await import("./audio.js");
  const cases = JSON.parse(readFileSync(join(where, "cases.json"), "utf8"));
  return cases.map(({ settings, wav }) => {
    const file = readFileSync(join(where, wav));
    const { samples, rate } = readWav(file.buffer.slice(file.byteOffset, file.byteOffset + file.length));
    const prepare = audioPreprocessor(settings);
    const { data, dims } = prepare.values(resample(samples, rate, prepare.rate));
    return { dims, values: [...data] };
  });
}

async function drive() {
  const { chromium: kind } = await import("playwright-core");
  const args = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
  ];
  const browser = await kind.launch({ executablePath: chromium, args });
  try {
    const page = await browser.newPage({ viewport: { width: 360, height: 780 } });
    const found = { errors: [], hosts: [], answers: {} };
    page.on("pageerror", ({ message }) => found.errors.push(message));
    page.on("request", (request) => found.hosts.push(new URL(request.url()).host));
    await page.goto(where);
    const answered = (name) => page.waitForFunction((wanted) => {
      const problem = document.querySelector("#problem h2").textContent;
      if (!/^Loading/.test(problem)) throw new Error(problem);
      return document.body.dataset.answered === wanted;
    }, name, { timeout: 30000 });
    await answered("");
    await page.selectOption("#source", user);
    await page.waitForFunction((name) => document.getElementById("about").textContent.startsWith(name), user);
    for (const name of [user, ""]) {
      await page.selectOption("#user", name);
      await answered(name);
      found.answers[name] = {
        best: await page.textContent("#best"), swap: await page.textContent("#total"),
        score: await page.textContent("#score"),
      };
    }
    const others = await page.$$eval("#user option", (all) => all.map(({ value }) => value));
    if (others.includes("bob")) {
      await page.selectOption("#user", "bob");
      await page.waitForSelector("#refused:not([hidden])");
      found.refused = await page.textContent("#refused");
    }
    await page.selectOption("#user", user);
    await answered(user);
    if (images) {
      await page.screenshot({ path: `${images}/phone.png`, fullPage: true });
      await page.setViewportSize({ width: 1080, height: 760 });
      await page.waitForTimeout(300);
      await page.screenshot({ path: `${images}/desktop.png`, fullPage: true });
      await page.setViewportSize({ width: 360, height: 780 });
    }
    await page.click("#record");
    await page.waitForFunction(() => document.body.dataset.clip === "recorded", null, { timeout: 20000 });
    found.recorded = await page.textContent("#best");
    found.width = await page.evaluate(() => document.documentElement.scrollWidth);
    return found;
  } finally {
    await browser.close();
  }
}

console.log(JSON.stringify(await { features, drive }[command]()));
