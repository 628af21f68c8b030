"""reports: a folder of predictions -> one page that shows what is in the bucket, for people who will not ask SQL.

1. tallies      predictions -> every number of the page, and the few hundred rows that are shown one by one
2. thumbnails   their images, read again -> small JPEGs inside the page, or the reason why there is none
3. predictions  all of it -> the page (page.html.j2 with page.css.j2, gallery.html.j2 and gallery.js.j2)
"""
