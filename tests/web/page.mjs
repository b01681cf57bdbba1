// What tests/web/test_page.py runs in Node; it prints one JSON line.
//
//   node page.mjs images FOLDER        cases.json through examples/web/images.js
//   node page.mjs drive ADDRESS CHROMIUM the page in a browser, with playwright-core

import { readFileSync } from "node:fs";
import { join } from "node:path";

const [, , command, where, chromium] = process.argv;

async function images() {
  const { preprocessor } = await import("./images.js");
  const cases = JSON.parse(readFileSync(join(where, "cases.json"), "utf8"));
  return cases.map(({ settings, config, image }) => {
    const { sized, values } = preprocessor(settings, config), found = sized({ ...image, data: Uint8Array.from(image.data) });
    const { data, dims } = values(found);
    return { pixels: [...found.data], values: [...data], dims };
  });
}

async function drive() {
  const { chromium: kind } = await import("playwright-core");
  const args = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
  ];
  const browser = await kind.launch({ executablePath: chromium, args });
  try {
    const page = await browser.newPage({ viewport: { width: 360, height: 780 } });
    const found = { errors: [], hosts: [], answers: {} };
    page.on("pageerror", ({ message }) => found.errors.push(message));
    page.on("request", (request) => found.hosts.push(new URL(request.url()).host));
    await page.goto(where);
    const answered = (wanted) => page.waitForFunction((name) => {
      const problem = document.querySelector("#problem h2").textContent;
      if (!/^Loading/.test(problem)) throw new Error(problem);
      const at = (id) => document.getElementById(id);
      return at("user").value === name && at("best").textContent &&
        (!name || at("score").textContent.includes(`${name}’s adapter`));
    }, wanted, { timeout: 20000 });
    for (const name of ["", "left", "right", ""]) {
      await page.selectOption("#user", name).catch(() => {});
      await answered(name);
      await page.waitForTimeout(200);
      (found.answers[name] ??= []).push(await page.textContent("#best"));
    }
    await page.selectOption("#user", "foreign");
    await page.waitForSelector("#refused:not([hidden])");
    found.refused = await page.textContent("#refused");
    await page.selectOption("#user", "");
    await page.selectOption("#source", "drawing");
    await page.locator("#canvas").scrollIntoViewIfNeeded();
    const box = await page.locator("#canvas").boundingBox();
    const point = (x, y) => [box.x + x * box.width, box.y + y * box.height];
    await page.mouse.move(...point(0.3, 0.2));
    await page.mouse.down();
    await page.mouse.move(...point(0.6, 0.8), { steps: 5 });
    await page.mouse.up();
    await page.waitForFunction(() => document.getElementById("quick").textContent);
    found.drawn = await page.textContent("#quick");
    found.width = await page.evaluate(() => document.documentElement.scrollWidth);
    return found;
  } finally {
    await browser.close();
  }
}

console.log(JSON.stringify(await { images, drive }[command]()));
